"""Spectra of the hidden states that rewards are read from, beside those of the base model."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from hafrm.reporting.axes import Scale, Series
from hafrm.reporting.blocks import Block, Cell, Column, Figure, Panels, Rows, Section, Table, words
from hafrm.reporting.folders import Json, Material, parts
from hafrm.reporting.numbers import Number, decimal, finite, per_cent
from hafrm.reporting.plots import chart


def section(material: Material) -> Section | None:
    """A spectrum for each diagnosis, and a row for each model."""
    figures, rows = [], []
    for folder, found in material.having("diagnostics"):
        models = parts(found, "representations")
        if not models:
            continue
        each = models[0] | {"also": models[1:], "base": found.get("base")}
        colour = material.colour(folder.name)
        figures.append(_spectrum(folder.name, each, colour))
        rows.append(_row(folder.name, each, colour))
        rows += [_row(name, other, None) for name, other in _others(each)]
    if not rows:
        return None
    columns = (
        *(Column("model", "word"), Column("effective rank"), Column("share of the first")),
        *(Column("CKA to its base"), Column("cosine to its base")),
    )
    lead = (
        "Singular values of the last hidden states, as shares of their sum. The effective rank is the "
        "exponential of their entropy: near 1 a model knows one direction only."
    )
    table = Table("Representation", columns, (Rows(tuple(rows)),))
    shown = tuple(figure for figure in figures if figure is not None)
    panels: tuple[Block, ...] = (Panels(shown),) if shown else ()
    return Section("representation", "Representation", lead, (*panels, table))


def _others(each: Json) -> Iterator[tuple[str, Json]]:
    """The base model, and other models that were looked at besides."""
    for other in parts(each, "also"):
        yield Path(str(other.get("model"))).name, other
    if each.get("base"):
        yield "base", each["base"]


def _spectrum(name: str, each: Json, colour: int) -> Figure | None:
    def series_of(label: str, of: Json, colour: int) -> Series:
        # a logarithm has no zero
        values = [v if v > 0 else math.nan for v in map(finite, of.get("spectrum") or ())]
        return Series(label, _places(values), values, colour, label=label)

    others = [(label, other) for label, other in _others(each) if label != "base"]
    series = [series_of(name, each, colour)]
    series += [series_of(n, o, colour + i) for i, (n, o) in enumerate(others, start=1)]
    if each.get("base"):
        series.append(replace(series_of("base", each["base"], colour), style="dashed"))
    scale = Scale("singular value", x_log=2, y_log=True)
    return chart(f"Spectrum, {name}", series, scale, "share of the sum")


def _places(values: Sequence[float]) -> list[float]:
    return [float(i) for i in range(1, len(values) + 1)]


def _row(name: str, each: Json, colour: int | None) -> tuple[Cell, ...]:
    top = finite(each.get("top_fraction"))
    distances = [each.get(f"{key}_to_base") for key in ("cka", "cosine")]
    return (
        words(name, colour=colour),
        Cell(decimal(each.get("effective_rank"), 1), is_strong=True),
        Cell(per_cent(None if math.isnan(top) else Number(top))),
        *(Cell("" if value is None else decimal(value)) for value in distances),
    )
