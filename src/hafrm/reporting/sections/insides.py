"""What diagnostics say about a model beyond its accuracy: labels, representations, consistency."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from hafrm.reporting.axes import Scale, Series
from hafrm.reporting.blocks import Block, Cell, Column, Figure, Panels, Rows, Section, Table, words
from hafrm.reporting.folders import Json, Material, dig, parts
from hafrm.reporting.numbers import Number, count, decimal, finite, number, share, significant
from hafrm.reporting.plots import chart
from hafrm.reporting.sections.accuracy import measured_sets
from hafrm.reporting.sections.calibration import diagnosed_sets


def noise(material: Material) -> Section | None:
    """How accuracy falls where models, or people, disagree."""
    blocks: list[Block] = []
    figures: list[Figure] = []
    for folder, found in material.having("diagnostics"):
        labels = dig(found, "label_noise")
        if not labels:
            continue
        figures += _noise_figures(folder.name, labels, material.colour(folder.name))
        blocks.append(_noise_table(folder.name, labels))
    if not blocks:
        return None
    lead = (
        "Where the models of an ensemble disagree, labels are the less to be trusted: either the "
        "comparison is hard or its label is wrong."
    )
    panels: tuple[Block, ...] = (Panels(tuple(figures)),) if figures else ()
    return Section("noise", "Label noise", lead, (*panels, *blocks))


def _noise_figures(name: str, labels: Json, colour: int) -> Iterator[Figure]:
    rows = parts(labels, "by_disagreement")
    accuracies = [number(row.get("accuracy")) or Number(math.nan) for row in rows]
    x = [finite(row.get("disagreement")) for row in rows]
    series = [
        Series(
            name="agreement with the label",
            x=x,
            y=[a.value for a in accuracies],
            colour=colour,
            low=[a.low for a in accuracies],
            high=[a.high for a in accuracies],
            style="dots",
        ),
    ]
    first = chart(f"Accuracy, {name}", series, Scale("disagreement", per_cent=True, reference=0.5))
    splits = [finite(row.get("vote_split")) for row in rows]
    people = [Series("people who voted against the label", x, splits, colour, style="dots")]
    second = chart(f"Votes against the label, {name}", people, Scale("disagreement", per_cent=True))
    return (figure for figure in (first, second) if figure is not None)


def _noise_table(name: str, labels: Json) -> Table:
    rows = tuple(
        (
            words(decimal(row.get("disagreement"))),
            Cell(count(row.get("num"))),
            Cell(share(number(row.get("accuracy")))),
            Cell(decimal(row.get("vote_split"), 2)),
        )
        for row in parts(labels, "by_disagreement")
    )
    columns = (
        *(Column("disagreement", "word"), Column("comparisons")),
        *(Column("accuracy"), Column("votes against the label")),
    )
    models = ", ".join(map(str, labels.get("models") or ()))
    note = f"{count(labels.get('num'))} comparisons, scored by {models}."
    if not math.isnan(finite(labels.get("auc"))):
        note += (
            f" Disagreement finds contested labels with an AUC of {decimal(labels['auc'], 2)}"
            " (0.5: not at all)."
        )
    return Table(f"Label noise, {name}", columns, (Rows(rows),), note)


def representation(material: Material) -> Section | None:
    """Spectra of the hidden states that the reward is read from, beside those of the base model."""
    figures, rows, bases = [], [], []
    for folder, found in material.having("diagnostics"):
        each = dig(found, "representation")
        if not each:
            continue
        colour = material.colour(folder.name)
        figures.append(_spectrum(folder.name, each, colour))
        rows.append((words(folder.name, colour=colour), *_spread(each), *_distance(each)))
        if each.get("base"):
            bases.append((words(f"base of {folder.name}"), *_spread(each["base"]), Cell(), Cell()))
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
    table = Table("Representation", columns, (Rows((*rows, *bases)),))
    shown = tuple(figure for figure in figures if figure is not None)
    panels: tuple[Block, ...] = (Panels(shown),) if shown else ()
    return Section("representation", "Representation", lead, (*panels, table))


def _spectrum(name: str, each: Json, colour: int) -> Figure | None:
    def values(of: Json | None) -> list[float]:
        return [finite(v) for v in (of or {}).get("spectrum") or ()]

    trained, base = values(each), values(each.get("base"))
    series = [
        Series("base", _places(base), base, colour, style="dashed", label="base"),
        Series(name, _places(trained), trained, colour, label="trained"),
    ]
    # a logarithm has no zero
    positive = [replace(s, y=[y if y > 0 else math.nan for y in s.y]) for s in series]
    scale = Scale("singular value", x_log=2, y_log=True)
    return chart(f"Spectrum, {name}", positive, scale, "share of the sum")


def _places(values: Sequence[float]) -> list[float]:
    return [float(i) for i in range(1, len(values) + 1)]


def _spread(each: Json) -> tuple[Cell, ...]:
    top = finite(each.get("top_share"))
    return (
        Cell(decimal(each.get("effective_rank"), 1), is_strong=True),
        Cell(f"{100 * top:.1f} %" if not math.isnan(top) else "n/a"),
    )


def _distance(each: Json) -> tuple[Cell, ...]:
    return tuple(Cell(decimal(dig(each, "distance", key))) for key in ("cka", "cosine"))


def agreement(material: Material) -> Section | None:
    """How alike both heads judge, and whatever was found about consistency."""
    blocks: list[Block] = []
    rows = [
        (
            words(name),
            Cell(run, colour=material.colour(run)),
            Cell(share(number(dig(each, "agreement", "same_sign"))), is_strong=True),
            Cell(decimal(dig(each, "agreement", "pearson"), 2)),
            Cell(decimal(dig(each, "agreement", "spearman"), 2)),
        )
        for run, name, each in _judged_twice(material)
    ]
    if rows:
        columns = (
            *(Column("set", "word"), Column("model", "word"), Column("same preference")),
            *(Column("Pearson"), Column("Spearman")),
        )
        caption = "Reward head and implicit reward of the policy head"
        blocks.append(Table(caption, columns, (Rows(tuple(rows)),)))
    for folder, found in material.having("diagnostics"):
        if dig(found, "consistency"):
            blocks.append(_consistency(folder.name, found["consistency"]))
    if not blocks:
        return None
    lead = (
        "Two views of the same comparisons should agree; where they do not, one of them is wrong."
    )
    return Section("agreement", "Agreement", lead, tuple(blocks))


def _judged_twice(material: Material) -> Iterator[tuple[str, str, Json]]:
    seen = set()
    for run, name, each in diagnosed_sets(material):
        if each.get("agreement"):
            seen.add((run, name))
            yield run, name, each
    for name, found in measured_sets(material).items():
        for measured in found:
            if measured.data.get("agreement") and (measured.run, name) not in seen:
                yield measured.run, name, measured.data


def _consistency(name: str, found: Json) -> Table:
    """Whatever it holds: a line for each number, called by the keys that lead to it."""
    rows = tuple((words(key), Cell(text)) for key, text in _leaves("", found))
    return Table(f"Consistency, {name}", (Column("", "word"), Column("")), (Rows(rows),))


def _leaves(prefix: str, found: Any) -> Iterator[tuple[str, str]]:
    estimate = number(found)
    if estimate is not None:
        yield prefix, share(estimate)
    elif isinstance(found, Mapping):
        for key, value in found.items():
            yield from _leaves(f"{prefix}, {key}" if prefix else str(key), value)
    elif isinstance(found, list):
        for i, value in enumerate(found[:20]):
            named = isinstance(value, Mapping) and isinstance(value.get("name"), str)
            yield from _leaves(f"{prefix} {value['name'] if named else i + 1}".strip(), value)
    elif isinstance(found, str):
        yield prefix, found
    elif found is not None:
        yield prefix, significant(found) if not isinstance(found, bool) else str(found).lower()
