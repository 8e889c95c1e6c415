"""Methods trained and tested across sets: who is better where, and which differences are real."""

from collections.abc import Iterator, Sequence

from hafrm.reporting.axes import Scale, Series
from hafrm.reporting.blocks import (
    Beside,
    Block,
    Cell,
    Column,
    Figure,
    More,
    Panels,
    Rows,
    Section,
    Table,
    words,
)
from hafrm.reporting.folders import Json, Material, parts, source_names
from hafrm.reporting.numbers import (
    MINUS,
    Number,
    bounds,
    counted,
    decimal,
    finite,
    number,
    p_value,
    per_cent,
    points,
    significant,
)
from hafrm.reporting.plots import chart
from hafrm.reporting.strips import Axis, Mark, axis_of, heading, whiskers

REAL_BELOW = 0.05
"""Adjusted p-values below it are called real."""
MOST_ROWS = 24
"""Of a table that is shown without being asked for."""


def section(material: Material) -> Section | None:
    """Heat maps, differences, the alpha sweep and the learning rates of every comparison."""
    blocks: list[Block] = []
    for _, found in material.having("comparison"):
        blocks += [*_heat_maps(found), *_averages(found), *_differences(found)]
        alphas = tuple(_alphas(found))
        if alphas:
            note = "Accuracy over the weight of the policy loss, with 95 % intervals."
            blocks.append(Panels(alphas, note=note))
        rates = _learning_rates(found)
        if rates is not None:
            blocks.append(More("Learning rates that were tried", (rates,)))
    if not blocks:
        return None
    lead = (
        "Rows are what a model was trained on, columns what it was tested on; framed cells are in domain. "
        "A difference is called real when its p-value, adjusted for the number of differences (Holm), is "
        f"below {REAL_BELOW}."
    )
    return Section("comparison", "Methods compared", lead, tuple(blocks))


def is_real(difference: Json) -> bool:
    """Whether chance is a poor explanation of a difference."""
    return finite(difference.get("p_adjusted")) < REAL_BELOW


def better_and_worse(difference: Json) -> tuple[str, str]:
    """The two methods of a difference, the better one first."""
    names = str(difference.get("first")), str(difference.get("second"))
    value = number(difference.get("difference"))
    return names if value is None or value.value >= 0 else (names[1], names[0])


def _names(found: Json) -> dict[str, str]:
    keys = ("train_sets", "test_sets")
    return source_names(list(dict.fromkeys(str(s) for key in keys for s in found.get(key) or ())))


def _heat_maps(found: Json) -> Iterator[Block]:
    names = _names(found)
    tests = [str(each) for each in found.get("test_sets") or ()]
    cells = {
        (c.get("train"), c.get("method"), c.get("test")): c for c in parts(found, "accuracies")
    }
    tables = []
    for method in found.get("methods") or ():
        rows = []
        for train in found.get("train_sets") or ():
            row = [
                _heat_cell(
                    cells.get((train, method, test)),
                    _against(found, train, method, test),
                    is_framed=_same_set(train, test),
                )
                for test in tests
            ]
            rows.append((words(names.get(train, train)), *row))
        tables.append(_heat_table(f"{method}, accuracy", tests, names, rows))
    longer = {test: number(each) for test, each in (found.get("pick_longer") or {}).items()}
    if longer:
        rules = (words("pick the longer"), *(_heat(longer.get(test)) for test in tests))
        tables.append(_heat_table("Baseline, accuracy", tests, names, [rules]))
    if tables:
        note = (
            "In brackets 95 % intervals. > and <: really better and worse than the methods named."
        )
        yield Beside(tuple(tables), note)


def _heat_table(
    caption: str, tests: Sequence[str], names: dict[str, str], rows: Sequence[tuple[Cell, ...]]
) -> Table:
    first = Column("trained on" if len(rows) > 1 else "", "word")
    columns = (first, *(Column(names.get(test, test), "heat") for test in tests))
    return Table(caption, columns, (Rows(tuple(rows)),))


def _against(found: Json, train: str, method: str, test: str) -> str:
    """What the method is really better and worse than in this cell, such as "> bt"."""
    better, worse = [], []
    for each in parts(found, "differences"):
        if (each.get("train"), each.get("test")) == (train, test) and is_real(each):
            winner, loser = better_and_worse(each)
            if winner == method:
                better.append(loser)
            elif loser == method:
                worse.append(winner)
    marks = [f"{mark} {', '.join(names)}" for mark, names in ((">", better), ("<", worse)) if names]
    return "  ".join(marks)


def _heat_cell(cell: Json | None, against: str, *, is_framed: bool) -> Cell:
    found = None if cell is None else number(cell.get("accuracy"))
    return _heat(found, against, is_framed=is_framed)


def _heat(found: Number | None, against: str = "", *, is_framed: bool = False) -> Cell:
    note = f"{bounds(found)}\n{against}".strip()
    heat = None if found is None else found.value
    return Cell(per_cent(found), note, heat=heat, is_framed=is_framed)


def _same_set(train: object, test: object) -> bool:
    """Whether a test set is another part of what was trained on."""
    return str(train).partition("#")[0] == str(test).partition("#")[0]


def _averages(found: Json) -> Iterator[Table]:
    """Means over test sets: in domain, in other domains, and so on."""
    every = parts(found, "averages")
    if not every:
        return
    axis = axis_of([number(each.get("accuracy")) for each in every], 0.5)
    groups: dict[str, list[tuple[Cell, ...]]] = {}
    for each in every:
        mean = number(each.get("accuracy"))
        sets = each.get("num_sets")
        title = (
            f"{each.get('kind')} ({counted(sets, 'pair')} of sets)" if sets else each.get("kind")
        )
        strip = whiskers(axis, [Mark(mean, 0)])
        cells = (words(str(each.get("method"))), Cell(per_cent(mean), is_strong=True))
        groups.setdefault(str(title), []).append((*cells, Cell(bounds(mean)), Cell(strip=strip)))
    columns = (
        *(Column("method", "word"), Column("mean accuracy"), Column("95 % interval")),
        Column("", "strip", heading(axis)),
    )
    rows = tuple(Rows(tuple(each), title) for title, each in groups.items())
    yield Table("Accuracy averaged over test sets, each counting alike", columns, rows)


def _differences(found: Json) -> Iterator[Block]:
    names = _names(found)
    averages = parts(found, "average_differences")
    if averages:
        groups = {"": _difference_rows(averages, names)}
        yield _difference_table("Differences of averages, in points", "average", averages, groups)
    every = parts(found, "differences")
    if every:
        trains = list(dict.fromkeys(str(each.get("train")) for each in every))
        rows = _difference_rows(every, names)
        groups = {
            f"trained on {names.get(train, train)}": [
                row
                for row, each in zip(rows, every, strict=True)
                if str(each.get("train")) == train
            ]
            for train in trains
        }
        caption = "Differences of methods, in points of accuracy"
        table = _difference_table(caption, "tested on", every, groups)
        yield More(f"All {len(every)} differences", (table,)) if len(every) > MOST_ROWS else table


def _difference_rows(every: Sequence[Json], names: dict[str, str]) -> list[tuple[Cell, ...]]:
    axis = _difference_axis(every)
    rows: list[tuple[Cell, ...]] = []
    for each in every:
        value, real = number(each.get("difference")), is_real(each)
        rows.append(
            (
                words(names.get(str(each.get("test")), str(each.get("test")))),
                Cell(f"{each.get('first')} {MINUS} {each.get('second')}"),
                Cell(points(value), is_strong=real),
                Cell(bounds(value)),
                Cell(strip=whiskers(axis, [Mark(value, 0 if real else None)])),
                Cell(p_value(each.get("p_value"))),
                Cell(p_value(each.get("p_adjusted")), is_strong=real),
            )
        )
    return rows


def _difference_axis(every: Sequence[Json]) -> Axis:
    return axis_of([number(each.get("difference")) for each in every], 0.0)


def _difference_table(
    caption: str, first: str, every: Sequence[Json], groups: dict[str, list[tuple[Cell, ...]]]
) -> Table:
    axis = heading(_difference_axis(every), sign=True)
    columns = (
        *(Column(first, "word"), Column("methods", "word"), Column("points")),
        *(Column("95 % interval"), Column("", "strip", axis), Column("p"), Column("p (Holm)")),
    )
    rows = tuple(Rows(tuple(each), title) for title, each in groups.items())
    return Table(caption, columns, rows, "In bold and in colour: real.")


def _alphas(found: Json) -> Iterator[Figure]:
    names = _names(found)
    panels: dict[tuple[str, str], dict[str, list[Json]]] = {}
    for each in parts(found, "alphas"):
        place = (str(each.get("train")), str(each.get("test")))
        panels.setdefault(place, {}).setdefault(str(each.get("policy_loss")), []).append(each)
    losses = list(dict.fromkeys(loss for panel in panels.values() for loss in panel))
    for (train, test), panel in panels.items():
        series = []
        for loss, sweep in panel.items():
            ordered = sorted(sweep, key=lambda s: finite(s.get("alpha")))
            estimates = [number(s.get("accuracy")) or Number(float("nan")) for s in ordered]
            series.append(
                Series(
                    name=loss,
                    x=[finite(s.get("alpha")) for s in ordered],
                    y=[e.value for e in estimates],
                    colour=losses.index(loss),
                    low=[e.low for e in estimates],
                    high=[e.high for e in estimates],
                    style="dots",
                    label=loss if len(losses) > 1 else "",
                )
            )
        scale = Scale("alpha", x_log=10, per_cent=True)
        title = f"{names.get(train, train)} \N{RIGHTWARDS ARROW} {names.get(test, test)}"
        figure = chart(title, series, scale, "trained \N{RIGHTWARDS ARROW} tested")
        if figure is not None:
            yield figure


def _learning_rates(found: Json) -> Table | None:
    names = _names(found)
    rows = []
    for each in parts(found, "learning_rates"):
        tried = [pair for pair in each.get("tried") or () if len(pair) == 2]
        chosen = each.get("chosen")
        losses = [f"{significant(rate)}: {decimal(loss)}" for rate, loss in tried]
        train = str(each.get("train"))
        rows.append(
            (
                words(names.get(train, train)),
                Cell(str(each.get("method"))),
                Cell(significant(chosen), is_strong=True),
                Cell("   ".join(losses)),
            )
        )
    if not rows:
        return None
    columns = (
        *(Column("trained on", "word"), Column("method", "word"), Column("chosen")),
        Column("rate: validation loss", "word"),
    )
    return Table("Learning rates, chosen by validation loss", columns, (Rows(tuple(rows)),))
