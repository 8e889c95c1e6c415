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
from hafrm.reporting.folders import Json, Material, dig, parts
from hafrm.reporting.numbers import bounds, count, decimal, finite, number, per_cent, share
from hafrm.reporting.plots import chart
from hafrm.reporting.sections.accuracy import measured_sets
from hafrm.reporting.sections.calibration import diagnosed_sets
from hafrm.reporting.strips import Mark, axis_of, heading, whiskers

BANDS = ("much shorter", "shorter", "about equal", "longer", "much longer")
"""As `hafrm evaluate` slices the chosen response against the rejected one."""
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


def _styles(material: Material) -> Iterator[Table]:
    for run, name, each in diagnosed_sets(material):
        found = parts(each, "style")
        if not found:
            continue
        keys = ("picks_more", "people_pick_more")
        axis = axis_of([number(row.get(key)) for row in found for key in keys], 0.5)
        rows = tuple(
            (
                words(str(row.get("feature"))),
                Cell(share(number(row.get("picks_more"))), is_strong=True),
                Cell(share(number(row.get("people_pick_more")))),
                Cell(
                    strip=whiskers(
                        axis,
                        [
                            Mark(number(row.get("people_pick_more"))),
                            Mark(number(row.get("picks_more")), material.colour(run)),
                        ],
                    )
                ),
                Cell(share(number(row.get("accuracy_more")))),
                Cell(share(number(row.get("accuracy_less")))),
            )
            for row in found
        )
        columns = (
            Column("feature", "word"),
            Column("the model picks more of it"),
            Column("people do"),
            Column("", "strip", heading(axis)),
            Column("accuracy, chosen has more"),
            Column("accuracy, chosen has less"),
        )
        note = "Only comparisons whose responses differ in the feature. Grey: people; in colour: the model."
        yield Table(f"Style on {name}, {run}", columns, (Rows(rows),), note)


def _slices(material: Material) -> Iterator[Block]:
    for run, name, each in diagnosed_sets(material):
        found = parts(each, "slices")
        if not found:
            continue
        table = _slice_table(
            found, material.colour(run), f"Accuracy by kind of row on {name}, {run}"
        )
        many = len(found) > 12
        yield More(f"{len(found)} kinds of rows on {name}, {run}", (table,)) if many else table


def _slice_table(found: Sequence[Json], colour: int, caption: str) -> Table:
    axis = axis_of([number(row.get("accuracy")) for row in found], 0.5)
    groups: dict[str, list[tuple[Cell, ...]]] = {}
    ordered = sorted(found, key=lambda r: -finite(dig(r, "accuracy", "num")))
    for row in ordered:
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
        *(Column("value", "word"), Column("accuracy"), Column("95 % interval")),
        *(Column("", "strip", heading(axis)), Column("comparisons")),
    )
    return Table(caption, columns, tuple(Rows(tuple(r), t) for t, r in groups.items()))
