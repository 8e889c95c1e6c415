"""What two scores per comparison say about a scorer: accuracy, calibration, length bias, agreement.

Plain numpy arrays in, frozen results out. `margin` is always score(chosen) - score(rejected). A scorer is
right only where the margin is above zero: equal scores are counted, and are not right. Comparisons that
people called a tie have no right answer; they stay out of every figure but the one about ties. Nothing
here runs a model or reads a file. NaN stands for "no data"; `to_dict` turns it into None for JSON.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Num, Shaped
from numpy.typing import NDArray

from hafrm.statistics import Estimate, accuracy_interval

LENGTH_BANDS = (1.1, 2.0)
"""Longer over shorter: up to the first is about equal, above the second is much longer or shorter."""
LENGTH_SLICES = ("much shorter", "shorter", "about equal", "longer", "much longer")
"""The chosen response against the rejected one."""


@dataclass(frozen=True, slots=True)
class Result:
    """Base of the results: they turn into plain dictionaries."""

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionaries, lists and numbers, ready for JSON; None for NaN and infinity."""
        return {name: plain(value) for name, value in dataclasses.asdict(self).items()}


@dataclass(frozen=True, slots=True)
class Accuracy(Result):
    """How often a scorer put the chosen response first."""

    num: int
    num_correct: int
    num_equal: int
    """Comparisons whose two scores are the same; not correct."""
    estimate: Estimate


@dataclass(frozen=True, slots=True)
class CalibrationBin(Result):
    """One point of a reliability diagram."""

    confidence: float
    """Mean predicted probability."""
    accuracy: float
    """Share of these predictions that came true."""
    num: int


@dataclass(frozen=True, slots=True)
class Calibration(Result):
    """How well p = sigmoid(margin) fits as the probability that people prefer the chosen response."""

    log_loss: float
    """Mean -log p (nat); the label is always "chosen". ln 2 = 0.693 is what a coin gets."""
    brier: float
    """Mean (1 - p)^2; a coin gets 0.25."""
    ece: float
    """Expected calibration error: the mean gap between confidence and accuracy over `bins`."""
    bins: tuple[CalibrationBin, ...]


@dataclass(frozen=True, slots=True)
class LengthBias(Result):
    """What response length alone explains."""

    slices: dict[str, Accuracy]
    """Accuracy by how long the chosen response is against the rejected one: LENGTH_SLICES."""
    pick_longer: Accuracy
    """A scorer that always takes the longer response; `num_equal` are of equal length."""
    pick_shorter: Accuracy
    pearson: float
    """Correlation of the margin with length(chosen) - length(rejected)."""
    spearman: float


@dataclass(frozen=True, slots=True)
class Ties(Result):
    """The comparisons that people called a tie: a good scorer puts them close together."""

    num: int
    mean_abs_margin: float
    mean_abs_margin_decided: float
    """The same of the comparisons that were decided."""


@dataclass(frozen=True, slots=True)
class Agreement(Result):
    """How alike two scorers judge the same comparisons."""

    same_sign: Estimate
    """Share of comparisons on which both margins have the same sign (both zero included)."""
    pearson: float
    spearman: float


@dataclass(frozen=True, slots=True)
class ScoredComparisons:
    """The scores of both sides of each comparison, and what slices and clusters them."""

    chosen_scores: Float[np.ndarray, " comparisons"]
    rejected_scores: Float[np.ndarray, " comparisons"]
    chosen_lengths: Num[np.ndarray, " comparisons"]
    """In characters, say; the same unit for both sides."""
    rejected_lengths: Num[np.ndarray, " comparisons"]
    prompts: Shaped[np.ndarray, " comparisons"]
    """Which prompt (any key): the clusters of the intervals."""
    ties: Bool[np.ndarray, " comparisons"]
    """True where people preferred neither."""

    def __post_init__(self) -> None:
        """Raises ValueError for a score that is not finite, which would silently count as wrong."""
        for name in ("chosen_scores", "rejected_scores"):
            broken = np.flatnonzero(~np.isfinite(getattr(self, name)))
            if len(broken):
                raise ValueError(
                    f"{len(broken)} of {len(self.ties)} {name} are not finite (first at index "
                    f"{broken[0]}): look at the model or its precision before measuring it"
                )

    @property
    def margins(self) -> NDArray[np.float64]:
        """score(chosen) - score(rejected), in float64."""
        return self.chosen_scores.astype(np.float64) - self.rejected_scores.astype(np.float64)


@dataclass(frozen=True, slots=True)
class PairwiseMetrics(Result):
    """Everything that `measure` finds."""

    accuracy: Accuracy
    mean_margin: float
    calibration: Calibration
    length: LengthBias
    ties: Ties


def measure(scored: ScoredComparisons, *, seed: int = 0) -> PairwiseMetrics:
    """All pairwise metrics of one scorer; `seed` is that of the intervals' resampling."""
    margins, decided = scored.margins, ~scored.ties
    prompts = scored.prompts[decided]
    return PairwiseMetrics(
        accuracy=pairwise_accuracy(margins[decided], prompts, seed=seed),
        mean_margin=mean(margins[decided]),
        calibration=calibration(margins[decided]),
        length=length_bias(
            margins[decided],
            scored.chosen_lengths[decided],
            scored.rejected_lengths[decided],
            prompts,
            seed=seed,
        ),
        ties=Ties(
            num=int(scored.ties.sum()),
            mean_abs_margin=mean(np.abs(margins[scored.ties])),
            mean_abs_margin_decided=mean(np.abs(margins[decided])),
        ),
    )


def pairwise_accuracy(
    margins: Num[np.ndarray, " comparisons"],
    prompts: Shaped[np.ndarray, " comparisons"] | None = None,
    *,
    seed: int = 0,
) -> Accuracy:
    """Share of margins above zero, with a 95 % interval that takes prompts as clusters."""
    correct = margins > 0
    return Accuracy(
        num=len(margins),
        num_correct=int(correct.sum()),
        num_equal=int(np.sum(margins == 0)),
        estimate=accuracy_interval(correct, prompts, seed=seed),
    )


def calibration(margins: Float[np.ndarray, " comparisons"], *, num_bins: int = 15) -> Calibration:
    """Log loss, Brier score and expected calibration error of p = sigmoid(margin).

    For the calibration error each comparison is looked at from both sides, (p, right) and (1 - p, wrong):
    left as they are, all labels would be "chosen" and only p = 1 would be calibrated. The bins have equal
    mass; points of equal p share their labels' mean, so that no order among them matters.
    """
    margins = margins.astype(np.float64)
    confidences = np.concatenate([_sigmoid(margins), _sigmoid(-margins)])
    labels = np.repeat([1.0, 0.0], len(margins))
    # Each distinct p once, with the share of its points that were right.
    _, index = np.unique(confidences, return_inverse=True)
    labels = (np.bincount(index, weights=labels) / np.bincount(index))[index]
    order = np.argsort(confidences, kind="stable")
    bins = tuple(
        CalibrationBin(mean(confidences[part]), mean(labels[part]), len(part))
        for part in np.array_split(order, num_bins)
        if len(part)
    )
    # ECE = sum over bins of n_b / n * |accuracy_b - confidence_b|
    gaps = [each.num * abs(each.accuracy - each.confidence) for each in bins]
    return Calibration(
        log_loss=mean(np.logaddexp(0.0, -margins)),
        brier=mean(_sigmoid(-margins) ** 2),
        ece=sum(gaps) / len(order) if len(order) else math.nan,
        bins=bins,
    )


def length_bias(
    margins: Float[np.ndarray, " comparisons"],
    chosen_lengths: Num[np.ndarray, " comparisons"],
    rejected_lengths: Num[np.ndarray, " comparisons"],
    prompts: Shaped[np.ndarray, " comparisons"] | None = None,
    *,
    seed: int = 0,
) -> LengthBias:
    """Accuracy by length ratio, the two baselines that look at length only, and the correlations.

    The baselines follow the rule for scores: responses of equal length are not right.
    """
    chosen, rejected = chosen_lengths.astype(np.float64), rejected_lengths.astype(np.float64)
    difference = chosen - rejected
    # Bands of longer / shorter with a sign, so that swapping the two sides mirrors the slices.
    ratio = np.maximum(chosen, rejected) / np.maximum(np.minimum(chosen, rejected), 1)
    band = np.sign(difference) * np.digitize(ratio, LENGTH_BANDS, right=True)

    def slice_accuracy(rows: NDArray[np.bool_]) -> Accuracy:
        clusters = None if prompts is None else prompts[rows]
        return pairwise_accuracy(margins[rows], clusters, seed=seed)

    return LengthBias(
        slices={
            name: slice_accuracy(band == which)
            for which, name in enumerate(LENGTH_SLICES, -len(LENGTH_BANDS))
        },
        pick_longer=pairwise_accuracy(difference, prompts, seed=seed),
        pick_shorter=pairwise_accuracy(-difference, prompts, seed=seed),
        pearson=pearson(margins, difference),
        spearman=spearman(margins, difference),
    )


def agreement(
    first_margins: Float[np.ndarray, " comparisons"],
    second_margins: Float[np.ndarray, " comparisons"],
    prompts: Shaped[np.ndarray, " comparisons"] | None = None,
    *,
    seed: int = 0,
) -> Agreement:
    """How alike two scorers judge; the margins may be on different scales."""
    same = np.sign(first_margins) == np.sign(second_margins)
    return Agreement(
        same_sign=accuracy_interval(same, prompts, seed=seed),
        pearson=pearson(first_margins, second_margins),
        spearman=spearman(first_margins, second_margins),
    )


def mean(values: Num[np.ndarray, " items"]) -> float:
    """The mean; NaN of nothing."""
    return float(values.mean()) if len(values) else math.nan


def pearson(first: Num[np.ndarray, " items"], second: Num[np.ndarray, " items"]) -> float:
    """Linear correlation; NaN for fewer than two items or a constant."""
    if len(first) < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return math.nan
    return float(np.corrcoef(first.astype(np.float64), second.astype(np.float64))[0, 1])


def spearman(first: Num[np.ndarray, " items"], second: Num[np.ndarray, " items"]) -> float:
    """Rank correlation, equal values sharing their mean rank; NaN for fewer than two or a constant."""
    return pearson(_ranks(first), _ranks(second))


def _ranks(values: Num[np.ndarray, " items"]) -> NDArray[np.float64]:
    """Ranks from 1, the mean rank for equal values."""
    _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[index], np.float64)


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    # exp(-log(1 + exp(-x))) cannot overflow.
    return np.asarray(np.exp(-np.logaddexp(0.0, -x)), np.float64)


def plain(value: Any) -> Any:
    """NaN and infinity as None, tuples as lists, all the way down."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, tuple):
        return [plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
