"""Whether sigmoid(margin) means what it says: reliability, calibration error, the fitted temperature."""

from collections.abc import Iterator

from hafrm.reporting.axes import Scale, Series
from hafrm.reporting.blocks import Block, Cell, Column, Figure, Panels, Rows, Section, Table, words
from hafrm.reporting.folders import Json, Material, dig, parts, source_names
from hafrm.reporting.numbers import decimal, finite, share_of
from hafrm.reporting.plots import chart, histogram
from hafrm.reporting.sections.accuracy import measured_sets


def section(material: Material) -> Section | None:
    """Reliability diagrams of every set, temperatures and histograms of the margins."""
    blocks: list[Block] = []
    diagrams = tuple(_diagrams(material))
    if diagrams:
        blocks.append(Panels(diagrams, _key(material)))
    table = _temperatures(material)
    if table is not None:
        blocks.append(table)
    margins = tuple(_margins(material))
    if margins:
        note = "Margins are score(chosen) \N{MINUS SIGN} score(rejected); right of zero the model is right."
        blocks.append(Panels(margins, note=note))
    if not blocks:
        return None
    lead = (
        "Points on the dashed line mean what they say: of the comparisons in which a model gives one side "
        "80 %, that side is preferred in 80 %. Below the line a model is surer than it should be."
    )
    return Section("calibration", "Calibration", lead, tuple(blocks))


def _key(material: Material) -> tuple[tuple[str, int], ...]:
    names = [f.name for f in material.folders if f.results.keys() & {"test", "diagnostics"}]
    return tuple((n, material.colour(n)) for n in names) if len(names) > 1 else ()


def _calibrations(material: Material) -> Iterator[tuple[str, str, Json]]:
    """(set, run, calibration) of the test sets, and of diagnosed sets that are not among them."""
    seen = set()
    for name, found in measured_sets(material).items():
        for each in found:
            calibration = dig(each.data, "calibration")
            if calibration:
                seen.add((each.run, name))
                yield name, each.run, calibration
    for run, name, diagnosed in diagnosed_sets(material):
        if (run, name) not in seen and diagnosed.get("calibration"):
            yield name, run, diagnosed["calibration"]


def diagnosed_sets(material: Material) -> Iterator[tuple[str, str, Json]]:
    """(run, set, what was found) of every set in a diagnostics.json."""
    for folder, found in material.having("diagnostics"):
        sets = parts(found, "sets")
        names = source_names([str(each.get("name")) for each in sets])
        for each in sets:
            yield folder.name, names[str(each.get("name"))], each


def _diagrams(material: Material) -> Iterator[Figure]:
    by_set: dict[str, list[Series]] = {}
    for name, run, calibration in _calibrations(material):
        # the other half mirrors this one
        bins = [b for b in parts(calibration, "bins") if finite(b.get("confidence")) >= 0.5]
        accuracies = [finite(b.get("accuracy")) for b in bins]
        intervals = [
            share_of(a, int(b.get("num") or 0)) for a, b in zip(accuracies, bins, strict=True)
        ]
        by_set.setdefault(name, []).append(
            Series(
                name=run,
                x=[finite(b.get("confidence")) for b in bins],
                y=accuracies,
                colour=material.colour(run),
                low=[i.low for i in intervals],
                high=[i.high for i in intervals],
                style="dots",
            )
        )
    scale = Scale("stated probability", per_cent=True, diagonal=True)
    for name, series in by_set.items():
        figure = chart(name, series, scale, "how often it came true")
        if figure is not None:
            yield figure


def _temperatures(material: Material) -> Table | None:
    rows = []
    for run, name, each in diagnosed_sets(material):
        fitted = each.get("temperature") or {}
        log_loss, ece = ([*(fitted.get(key) or ()), None, None][:2] for key in ("log_loss", "ece"))
        if not fitted:
            continue
        rows.append(
            (
                words(name),
                Cell(run, colour=material.colour(run)),
                Cell(decimal(fitted.get("value"), 2), is_strong=True),
                *(Cell(decimal(value)) for value in (*log_loss, *ece)),
            )
        )
    if not rows:
        return None
    columns = (
        *(Column("set", "word"), Column("model", "word"), Column("temperature")),
        *(Column("log-loss"), Column("after"), Column("ECE"), Column("after")),
    )
    note = "p = sigmoid(margin / temperature). Above 1 the model is surer than it should be."
    return Table("Fitted temperature", columns, (Rows(tuple(rows)),), note)


def _margins(material: Material) -> Iterator[Figure]:
    several = len(list(material.having("diagnostics"))) > 1
    for run, name, each in diagnosed_sets(material):
        found = each.get("margins") or {}
        title = f"Margins on {name}" + (f", {run}" if several else "")
        edges = [finite(edge) for edge in found.get("edges") or ()]
        right, wrong = (list(found.get(key) or ()) for key in ("right", "wrong"))
        if edges and edges[0] == 0:
            # bins of |margin|: what is wrong lies on the other side of zero
            edges, right, wrong = (
                [-edge for edge in edges[:0:-1]] + edges,
                [0] * len(right) + right,
                wrong[::-1] + [0] * len(wrong),
            )
        figure = histogram(title, edges, right, wrong, unit="comparisons")
        if figure is not None:
            yield figure
