"""Label noise: how accuracy falls where models, or people, disagree."""

import math
from collections.abc import Iterator
from pathlib import Path

from hafrm.reporting.axes import Scale, Series
from hafrm.reporting.blocks import Block, Cell, Column, Figure, Panels, Rows, Section, Table, words
from hafrm.reporting.folders import Json, Material, dig, parts, short_names
from hafrm.reporting.numbers import (
    Number,
    count,
    finite,
    number,
    per_cent,
    share,
    with_bounds,
)
from hafrm.reporting.plots import chart


def section(material: Material) -> Section | None:
    """One figure and table for each diagnosis that has an audit of labels."""
    figures: list[Figure] = []
    tables: list[Block] = []
    for folder, found in material.having("diagnostics"):
        labels = dig(found, "label_noise")
        if not labels:
            continue
        figures += _figures(folder.name, labels, material.colour(folder.name))
        if parts(labels, "by_disagreement"):
            tables.append(_table(folder.name, labels))
        if parts(labels, "predictors"):
            tables.append(_predictors(folder.name, labels))
    if not (figures or tables):
        return None
    lead = (
        "Where several models disagree, labels are the less to be trusted: either the comparison is hard "
        "or its label is wrong. People's votes, where they are known, say which."
    )
    panels: tuple[Block, ...] = (Panels(tuple(figures)),) if figures else ()
    return Section("noise", "Label noise", lead, (*panels, *tables))


def _figures(name: str, labels: Json, colour: int) -> Iterator[Figure]:
    rows = parts(labels, "by_disagreement")
    places = [finite(row.get("low")) for row in rows]
    for title, reference, found in (
        (f"Accuracy, {name}", 0.5, [number(row.get("accuracy")) for row in rows]),
        (f"People disagreed, {name}", None, [_split(row) for row in rows]),
    ):
        numbers = [each or Number(math.nan) for each in found]
        series = Series(
            name="comparisons",
            x=places,
            y=[each.value for each in numbers],
            colour=colour,
            low=[each.low for each in numbers],
            high=[each.high for each in numbers],
            style="dots",
        )
        scale = Scale("models in the minority", per_cent=True, reference=reference)
        figure = chart(title, [series], scale)
        if figure is not None:
            yield figure


def _split(row: Json) -> Number | None:
    """The share of comparisons with votes on which people were split."""
    return number(row.get("split"))


def _known(value: object) -> Number | None:
    """A share without an interval."""
    share = finite(value)
    return None if math.isnan(share) else Number(share)


def _table(name: str, labels: Json) -> Table:
    rows = tuple(
        (
            words(per_cent(_known(row.get("low")))),
            Cell(share(number(row.get("accuracy"))), is_strong=True),
            Cell(share(_split(row))),
            Cell(count(row.get("num"))),
        )
        for row in parts(labels, "by_disagreement")
    )
    columns = (
        *(Column("models in the minority", "word"), Column("accuracy [95 %]")),
        *(Column("people disagreed"), Column("comparisons")),
    )
    models = ", ".join(short_names([Path(str(model)) for model in labels.get("models") or ()]))
    note = f"{count(labels.get('num'))} comparisons, scored by {models}. "
    note += "Models in the minority: the share that disagrees with most of them."
    against = number(dig(labels, "against", "fraction"))
    if against is not None:
        note += f" Every model is against the label in {share(against)} of the comparisons"
        split, others = (number(dig(labels, "against", key)) for key in ("split", "split_others"))
        if split is not None and others is not None:
            note += f"; people disagreed on {share(split)} of these, and on {share(others)} of the others"
        note += "."
    return Table(f"Accuracy by disagreement, {name}", columns, (Rows(rows),), note)


def _predictors(name: str, labels: Json) -> Table:
    rows = tuple(
        (words(str(each.get("name"))), Cell(with_bounds(number(each.get("auc")))))
        for each in parts(labels, "predictors")
    )
    columns = (Column("predictor", "word"), Column("AUC [95 %]"))
    note = "AUC of telling split from unanimous votes; 0.5 is chance."
    return Table(f"What predicts that people disagree, {name}", columns, (Rows(rows),), note)
