"""The result of `hafrm evaluate --diagnose`, with its tables; measures of last-token hidden states.

The paper's second claim is that the policy loss keeps a reward model's representation from collapsing onto
the direction of its reward. No figure depends on the scale of the states. No model is run here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from hafrm.diagnostics.breakdown import LabelNoise, Slice, StyleBias, WorstExample
from hafrm.errors import NumericsError
from hafrm.evaluation.metrics import Accuracy, Temperature
from hafrm.results import Cell, Table, columns
from hafrm.statistics import Real, effective_rank, spectrum

StateMatrix = Float[np.ndarray, "responses hidden"]
MIN_COMPARISONS = 10
"""Comparisons that a style feature needs to be shown; the result has all features."""


@dataclass(frozen=True, slots=True)
class Representation:
    """One model's states, and how similar they are to the base model's."""

    model: str
    effective_rank: Real
    """exp of the entropy of the spectrum: this many equally strong directions have the same entropy."""
    top_fraction: Real  # of the variance, along its first direction
    mean_cosine: Real
    """Between the states of two different responses; near 1, all states point in the same direction."""
    cka_to_base: Real = math.nan
    """Linear CKA, 1 for equal up to rotation and scale; NaN without a base model."""


@dataclass(frozen=True, slots=True)
class SetDiagnosis:
    """One source, or all of them together."""

    name: str
    num: int  # comparisons that are not ties
    accuracy: Accuracy
    temperature: Temperature
    style: tuple[StyleBias, ...]
    slices: tuple[Slice, ...]


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All diagnostics of one model."""

    model: str
    scored_with: str  # "reward" or "implicit reward"
    sets: tuple[SetDiagnosis, ...]
    label_noise: LabelNoise | None  # None for a single model on data without votes
    representations: tuple[Representation, ...]  # of the model, then of the others
    base: Representation | None
    num_states: int  # responses whose states are measured
    worst: tuple[WorstExample, ...]

    def tables(self) -> tuple[Table, ...]:
        """Calibration, style, slices, label noise, representations; the report shows the examples."""
        # style: a table each, features are many
        parts = [self._calibration(), *map(_style, self.sets)]
        parts += [_slices(self.sets)] if any(result.slices for result in self.sets) else []
        parts += [] if self.label_noise is None else [_label_noise(self.label_noise)]
        return (*parts, self._representations())

    def _calibration(self) -> Table:
        fits = ((r, r.temperature) for r in self.sets)
        rows = tuple(
            (r.name, r.num, r.accuracy, fit.note or fit.value, *fit.log_loss, *fit.ece)
            for r, fit in fits
        )
        heads = columns(
            "set | comparisons: count | accuracy: percent | T: decimal | "
            "log-loss: decimal | with T: decimal | ECE: decimal | with T: decimal"
        )
        title = f"{self.model}, scored with the {self.scored_with}: accuracy [95 %] and calibration"
        note = "T is fitted on half of the prompts; the columns after it are of the other half"
        return Table(title, heads, rows, (note,))

    def _representations(self) -> Table:
        heads = columns(
            "model | effective rank: decimal | top direction: decimal | mean cosine: decimal | "
            "CKA to base: decimal"
        )
        rows: list[tuple[Cell, ...]] = []
        for r in (*self.representations, *([] if self.base is None else [self.base])):
            name = r.model + (" (base)" if r is self.base else "")
            # None is an empty cell: without a base, nothing is missing
            to_base = None if math.isnan(r.cka_to_base) else r.cka_to_base
            rank = f"{r.effective_rank:.1f}"
            rows.append((name, rank, r.top_fraction, r.mean_cosine, to_base))
        title = f"last-token hidden states of {self.num_states} responses"
        return Table(title, heads, tuple(rows))


def _style(result: SetDiagnosis) -> Table:
    rows = []
    for bias in result.style:
        if bias.num >= MIN_COMPARISONS:
            # the interval of the difference does not contain zero
            mark = "*" if bias.excess.low > 0 or bias.excess.high < 0 else ""
            fractions = (bias.picks_more, bias.annotators_pick_more, bias.excess)
            accuracies = (bias.accuracy_more, bias.accuracy_less)
            rows.append((bias.feature + mark, bias.num, *fractions, *accuracies))
    heads = columns(
        "feature | differ: count | model: more: percent | annotators: more: percent | excess: percent | "
        "right if more: percent | if less: percent"
    )
    title = f"{result.name}: which response is preferred, by what there is more of [95 %]"
    note = "* the model differs from the annotators; features go together, above all with length"
    return Table(title, heads, tuple(rows), (note,))


def _slices(sets: Sequence[SetDiagnosis]) -> Table:
    rows = []
    for result in sets:
        before = ""
        for number, part in enumerate(result.slices):
            name, tag = "" if number else result.name, "" if part.tag == before else part.tag
            before = part.tag  # a tag is written once, above its values
            rows.append((name, tag, part.value, part.accuracy.num, part.accuracy))
    heads = columns("set | slice | value | comparisons: count | accuracy: percent")
    return Table("accuracy by slice [95 %]", heads, tuple(rows))


def _label_noise(noise: LabelNoise) -> Table:
    rows: list[tuple[Cell, ...]] = [
        (f"disagreement {band.disagreement:.2f}", band.num, band.accuracy, band.split)
        for band in noise.by_disagreement
    ]
    rows.append((f"all contradict the label: {noise.against}", None, None, noise.split_against))
    heads = "comparisons with | comparisons: count | accuracy of the mean margin: percent"
    if noise.num_with_votes:
        rows.append(("the others", None, None, noise.split_others))
        heads += " | annotators split: percent"
    else:
        rows = [row[:3] for row in rows]
    note = f"label audit by {', '.join(noise.models)}"
    return Table("models and annotators [95 %]", columns(heads), tuple(rows), (note,))


def describe_states(
    model: str, states: StateMatrix, base: Float[np.ndarray, "responses base_hidden"] | None = None
) -> Representation:
    """Measures of a model's states; raises NumericsError for states that are not finite."""
    for array in (states, base):
        if array is not None and not np.isfinite(array).all():
            raise NumericsError(
                f"{model} gives hidden states that are not finite; check its weights, or run it in float32"
            )
    fractions = spectrum(states)
    top = float(fractions[0]) if len(fractions) else math.nan
    cka = math.nan if base is None else linear_cka(states, base)
    return Representation(model, effective_rank(fractions), top, mean_cosine(states), cka)


def mean_cosine(states: StateMatrix) -> float:
    """Mean cosine over all pairs of different responses (anisotropy, arXiv 1909.00512)."""
    num, exact = len(states), states.astype(np.float64)
    if num < 2:
        return math.nan
    # a state of zeros stays zero
    unit = exact / np.maximum(np.linalg.norm(exact, axis=1, keepdims=True), 1e-300)
    # |sum of unit vectors|^2 is the sum over all pairs; num of them pair a state with itself
    total = np.sum(unit.sum(axis=0) ** 2)
    return float((total - num) / (num * (num - 1)))


def linear_cka(
    first: Float[np.ndarray, "responses first_hidden"],
    second: Float[np.ndarray, "responses second_hidden"],
) -> float:
    """Linear centred kernel alignment, |Y'X|^2 / (|X'X| |Y'Y|) of centred states (arXiv 1905.00414).

    NaN if one of the two is constant. With fewer responses than directions it is biased upwards.
    """
    # both Gram matrices are [hidden, hidden], not [responses, responses]
    x, y = (s.astype(np.float64) - s.mean(axis=0, dtype=np.float64) for s in (first, second))
    cross, own, other = (np.linalg.norm(a.T @ b) for a, b in ((y, x), (x, x), (y, y)))
    return float(cross**2 / (own * other)) if own * other > 0 else math.nan
