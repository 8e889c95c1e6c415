"""What scores lean on besides quality: length, style, and the kinds of rows they are right on."""

from collections.abc import Iterator, Sequence

from hafrm.reporting.axes import Scale, Series
from hafrm.reporting.blocks import (
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
from hafrm.reporting.folders import Json, Material, dig, parts, source_names
from hafrm.reporting.numbers import bounds, count, decimal, number, per_cent, share
from hafrm.reporting.plots import chart
from hafrm.reporting.sections.accuracy import measured_sets
from hafrm.reporting.strips import Mark, axis_of, heading, whiskers

BANDS = ("much shorter", "shorter", "about equal", "longer", "much longer")
"""As `hafrm evaluate` slices the chosen response against the rejected one."""
MOST_ROWS = 24
"""Of a table that is shown without being asked for."""
TICKS = ("much\nshorter", "shorter", "equal", "longer", "much\nlonger")


def section(material: Material) -> Section | None:
    """Accuracy by length, correlations with length, style features, slices."""
    figures = tuple(_by_length(material))
    runs = [f.name for f, _ in material.having("test")]
    key = tuple((n, material.colour(n)) for n in runs) if len(runs) > 1 else ()
    blocks: list[Block] = [Panels(figures, key, NOTE)] if figures else []
    blocks += [t for t in (_correlations(material), *_styles(material)) if t is not None]
    blocks += list(_slices(material))
    if not blocks:
        return None
    lead = (
        "A model that leans on length is right where the chosen response is the longer one and wrong where "
        "it is the shorter one: a level row of dots is what one hopes for."
    )
    return Section("bias", "Length and style", lead, tuple(blocks))


NOTE = (
    "Accuracy by the length of the chosen response against the rejected one, with 95 % intervals."
)


def _by_length(material: Material) -> Iterator[Figure]:
    for name, found in measured_sets(material).items():
        series = []
        for each in found:
            numbers = [number(dig(each.data, "length", "slices", band)) for band in BANDS]
            series.append(
                Series(
                    name=each.run,
                    x=[float(i) for i in range(len(BANDS))],
                    y=[n.value if n else float("nan") for n in numbers],
                    colour=material.colour(each.run),
                    low=[n.low if n else float("nan") for n in numbers],
                    high=[n.high if n else float("nan") for n in numbers],
                    style="dots",
                )
            )
        scale = Scale("chosen response", per_cent=True, reference=0.5, ticks=TICKS)
        figure = chart(name, series, scale, "accuracy")
        if figure is not None:
            yield figure


def _correlations(material: Material) -> Table | None:
    rows = tuple(
        (
            words(name),
            Cell(each.run, colour=material.colour(each.run)),
            Cell(share(each.length_rule("pick_longer"))),
            Cell(decimal(dig(each.data, "length", "pearson"), 2)),
            Cell(decimal(dig(each.data, "length", "spearman"), 2)),
        )
        for name, found in measured_sets(material).items()
        for each in found
        if dig(each.data, "length")
    )
    if not rows:
        return None
    columns = (
        *(Column("set", "word"), Column("model", "word"), Column("people prefer the longer")),
        *(Column("Pearson"), Column("Spearman")),
    )
    note = "Correlation of the margin with length(chosen) \N{MINUS SIGN} length(rejected); 0: none."
    return Table("Margin and length", columns, (Rows(rows),), note)


def _main_and_others(material: Material, key: str) -> Iterator[tuple[str, str, list[Json], bool]]:
    """(run, set, rows, whether it is the run's main set) of what diagnostics has under a key."""
    for folder, found in material.having("diagnostics"):
        sets = [each for each in parts(found, "sets") if parts(each, key)]
        main = next((each for each in sets if each.get("name") == "all"), sets[0] if sets else None)
        names = source_names([str(each.get("name")) for each in sets])
        for each in sorted(sets, key=lambda each: each is not main):
            yield folder.name, names[str(each.get("name"))], parts(each, key), each is main


def _styles(material: Material) -> Iterator[Block]:
    for run, name, found, is_main in _main_and_others(material, "style"):
        rows = [row for row in found if number(row.get("picks_more")) is not None]
        if rows:
            table = _style_table(rows, material.colour(run), f"Style on {name}, {run}")
            yield table if is_main else More(table.caption, (table,))


def _style_table(found: Sequence[Json], colour: int, caption: str) -> Table:
    keys = ("picks_more", "annotators_pick_more", "accuracy_more", "accuracy_less")
    axis = axis_of([number(row.get(key)) for row in found for key in keys[:2]], 0.5)
    rows = []
    for row in found:
        model, people, more, less = (number(row.get(key)) for key in keys)
        rows.append(
            (
                words(str(row.get("feature"))),
                Cell(share(model), is_strong=True),
                Cell(share(people)),
                Cell(strip=whiskers(axis, [Mark(model, colour), Mark(people)])),
                Cell(share(more)),
                Cell(share(less)),
            )
        )
    columns = (
        *(Column("feature", "word"), Column("the model picks more of it"), Column("people do")),
        *(Column("", "strip", heading(axis)), Column("accuracy, chosen has more")),
        Column("accuracy, chosen has less"),
    )
    note = (
        "Of comparisons whose responses differ in the feature. In colour the model, in grey people."
    )
    return Table(caption, columns, (Rows(tuple(rows)),), note)


def _slices(material: Material) -> Iterator[Block]:
    for run, name, found, is_main in _main_and_others(material, "slices"):
        caption = f"Accuracy by kind of row on {name}, {run}"
        table = _slice_table(found, material.colour(run), caption)
        yield table if is_main and len(found) <= MOST_ROWS else More(caption, (table,))


def _slice_table(found: Sequence[Json], colour: int, caption: str) -> Table:
    axis = axis_of([number(row.get("accuracy")) for row in found], 0.5)
    groups: dict[str, list[tuple[Cell, ...]]] = {}
    for row in found:
        accuracy = number(row.get("accuracy"))
        groups.setdefault(str(row.get("tag")), []).append(
            (
                words(str(row.get("value"))),
                Cell(per_cent(accuracy), is_strong=True),
                Cell(bounds(accuracy)),
                Cell(strip=whiskers(axis, [Mark(accuracy, colour)])),
                Cell(count(accuracy.num if accuracy else None)),
            )
        )
    columns = (
        *(Column("rows", "word"), Column("accuracy"), Column("95 % interval")),
        *(Column("", "strip", heading(axis)), Column("comparisons")),
    )
    return Table(caption, columns, tuple(Rows(tuple(r), t) for t, r in groups.items()))
