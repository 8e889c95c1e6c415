"""What scores say about a model: accuracy, calibration, temperature, length bias.

Arrays in, frozen results out; NaN means "no data". A scorer is right only if the margin is above zero:
equal scores are not right, and are also counted separately. Ties are left out of every number except
their own.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Num
from scipy.optimize import brentq
from scipy.special import expit

from hafrm.evaluation.comparisons import Comparisons, Margins, PromptKeys
from hafrm.results import Cell, Column, Table, columns
from hafrm.statistics import SEED, Estimate, Real, accuracy_interval

Lengths = Num[np.ndarray, " comparisons"]
LENGTH_BANDS = (1.1, 2.0)
"""Longer over shorter: up to the first is about equal, above the second is much longer or shorter."""
LENGTH_SLICES = ("much shorter", "shorter", "about equal", "longer", "much longer")
"""The length of the chosen response compared with the rejected one."""


@dataclass(frozen=True, slots=True)
class Accuracy(Estimate):
    """How often a scorer put the chosen response first."""

    num_correct: int = 0
    num_equal: int = 0  # comparisons whose two scores are the same; not correct


@dataclass(frozen=True, slots=True)
class CalibrationBin:
    """One point of a reliability diagram: mean predicted probability, and how often it came true."""

    confidence: float
    accuracy: float
    num: int


@dataclass(frozen=True, slots=True)
class Calibration:
    """How well p = sigmoid(margin) fits as the probability that the chosen response is preferred."""

    log_loss: Real  # mean -log p (nat); the label is always "chosen". ln 2 = 0.693 is chance
    ece: Real
    """Expected calibration error: the mean gap between confidence and accuracy over `bins`."""
    bins: tuple[CalibrationBin, ...]


@dataclass(frozen=True, slots=True)
class Temperature:
    """The T whose sigmoid(margin / T) fits best; log-loss and ECE on prompts that it was not fitted on."""

    value: Real
    """Above 1: margins too large for their accuracy; infinite: no better than chance; NaN: no optimum."""
    log_loss: tuple[Real, Real]  # as the model is, and with the temperature; ln 2 = 0.693 is chance
    ece: tuple[Real, Real]  # as the model is, and with the temperature
    note: str  # why there is no finite temperature; "" if there is one


@dataclass(frozen=True, slots=True)
class LengthEffects:
    """What response length alone explains."""

    slices: dict[str, Accuracy]
    """Accuracy by the length of the chosen response relative to the rejected one: LENGTH_SLICES."""
    pick_longer: Accuracy
    pick_shorter: Accuracy


@dataclass(frozen=True)
class PairwiseMetrics:
    """Everything that is measured of one scorer."""

    accuracy: Accuracy
    mean_margin: Real
    calibration: Calibration
    length: LengthEffects
    num_ties: int  # comparisons that annotators called a tie; they are in no other number


@dataclass(frozen=True)
class SetResult(PairwiseMetrics):
    """One source, or all of them together, by the reward (for a policy alone: the implicit reward).

    `implicit` is set if the model has an implicit reward besides the reward.
    """

    name: str
    implicit: PairwiseMetrics | None = None
    same_sign: Estimate | None = None
    """How often reward and implicit reward prefer the same response (both none included)."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A model on preference data."""

    model: str
    scored_with: str  # "reward" or "implicit reward"
    sets: tuple[SetResult, ...]  # one for each source, then "all" if there are several
    num_bad_rows: int
    left_out: dict[str, int]  # rows of named sets that these do not use, by reason
    prompts_cut: int
    responses_cut: int
    seam_merges: int
    """Responses whose first tokens would merge with the prompt's last for a consumer."""
    trained_on: tuple[str, ...] = ()
    """Files among the sources that the model was trained on: it has seen their answers."""

    @property
    def accuracy(self) -> Accuracy:
        """Accuracy on all comparisons together."""
        return self.sets[-1].accuracy  # "all" is last

    @property
    def single_sets(self) -> tuple[SetResult, ...]:
        """The sets without "all", the one for all sources together."""
        return self.sets[:-1] or self.sets

    def tables(self) -> tuple[Table, ...]:
        """Accuracy of every set next to the length baseline, accuracy by length, both heads."""
        has_both = any(result.implicit for result in self.sets)
        heads = [_both_heads(self.sets)] if has_both else []
        return (self._accuracies(), _by_length(self.sets), *heads)

    def _accuracies(self) -> Table:
        rows: list[tuple[Cell, ...]] = []
        for r in self.sets:
            fit, equal = r.calibration, r.accuracy.num_equal
            estimates = r.accuracy, r.length.pick_longer, r.mean_margin, fit.log_loss, fit.ece
            rows.append((r.name, r.accuracy.num, *estimates, equal, r.num_ties))
        notes = [f"left out: {reason}: {num} rows" for reason, num in self.left_out.items()]
        notes.append(
            f"bad rows {self.num_bad_rows}, responses cut {self.responses_cut}, "
            f"prompts cut {self.prompts_cut}, seam merges {self.seam_merges}"
        )
        heads = columns(
            "set | comparisons: count | accuracy [95 %]: percent | pick longer [95 %]: percent | "
            "mean margin: decimal | log-loss: decimal | ECE: decimal | equal: count | ties: count"
        )
        title = f"{self.model}, scored with the {self.scored_with}"
        return Table(title, heads, tuple(rows), tuple(notes))


def _by_length(sets: tuple[SetResult, ...]) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for result in sets:
        slices = [result.length.slices[name] for name in LENGTH_SLICES]
        rows.append((result.name, *slices))
        rows.append(("  comparisons", *(accuracy.num for accuracy in slices)))
    heads = (Column("set"), *(Column(name, "count") for name in LENGTH_SLICES))
    return Table("accuracy by length of the chosen response [95 %]", heads, tuple(rows))


def _both_heads(sets: tuple[SetResult, ...]) -> Table:
    """Each head's accuracy, one below the other."""
    rows: list[tuple[Cell, ...]] = []
    for r in sets:
        rows.append((r.name, "reward", r.accuracy, None))
        if r.implicit is not None:
            rows.append(("", "implicit reward", r.implicit.accuracy, r.same_sign))
    heads = columns("set | scorer | accuracy [95 %]: percent | same sign [95 %]: percent")
    return Table("both heads", heads, tuple(rows))


def pairwise_metrics(comparisons: Comparisons, margins: Margins) -> PairwiseMetrics:
    """All metrics of one scorer."""
    # a tie has no right answer, and would count as wrong
    decided = ~comparisons.ties
    margins, prompts = margins[decided], comparisons.prompts[decided]
    chosen, rejected = comparisons.lengths[:, decided]
    return PairwiseMetrics(
        accuracy=pairwise_accuracy(margins, prompts),
        mean_margin=mean(margins),
        calibration=calibration(margins),
        length=length_bias(margins, chosen, rejected, prompts),
        num_ties=int(comparisons.ties.sum()),
    )


def pairwise_accuracy(margins: Lengths, prompts: PromptKeys | None = None) -> Accuracy:
    """Fraction of margins above zero, with a 95 % interval that treats prompts as clusters."""
    correct = margins > 0
    e = accuracy_interval(correct, prompts)
    counts = int(correct.sum()), int(np.sum(margins == 0))
    return Accuracy(e.value, e.low, e.high, e.num, e.method, e.proportion, *counts)


def calibration(margins: Margins, *, num_bins: int = 15) -> Calibration:
    """Log loss and expected calibration error of p = sigmoid(margin).

    For the calibration error each comparison counts from both sides, (p, right) and (1 - p, wrong):
    otherwise all labels would be "chosen" and only p = 1 would be calibrated. The bins have equal mass;
    points with equal p get the mean of their labels, so that their order does not matter.
    """
    margins = margins.astype(np.float64)
    confidences = np.concatenate([expit(margins), expit(-margins)])  # [2 * comparisons]
    labels = np.repeat([1.0, 0.0], len(margins))
    # each distinct p once, with the fraction of its points that were right
    _, index = np.unique(confidences, return_inverse=True)
    labels = (np.bincount(index, weights=labels) / np.bincount(index))[index]
    # equal mass: bins of equal width would be empty where the scorer is rarely that sure
    order = np.argsort(confidences, kind="stable")
    bins = tuple(
        CalibrationBin(mean(confidences[part]), mean(labels[part]), len(part))
        for part in np.array_split(order, num_bins)
        if len(part)
    )
    # ECE = sum over bins of n_b / n * |accuracy_b - confidence_b|
    gaps = [b.num * abs(b.accuracy - b.confidence) for b in bins]
    return Calibration(
        log_loss=mean(np.logaddexp(0.0, -margins)),  # -log sigmoid(m) without overflow
        ece=sum(gaps) / len(order) if len(order) else math.nan,
        bins=bins,
    )


def temperature(margins: Margins, prompts: PromptKeys) -> Temperature:
    """Fitted on a random half of the prompts, tested on the other; NaN if there is only one prompt.

    Temperature scaling (Guo et al. 2017, arXiv 1706.04599) for comparisons.
    """
    names, cluster = np.unique(prompts, return_inverse=True)
    is_fitted = np.random.default_rng(SEED).permutation(len(names)) < len(names) // 2
    # split by prompt: comparisons of one prompt on both sides would leak
    tested = margins[~is_fitted[cluster]].astype(np.float64)
    value = fit_temperature(margins[is_fitted[cluster]])
    before = calibration(tested)
    # an infinite temperature makes every probability one half
    after = calibration(np.empty(0) if math.isnan(value) else tested / value)
    note = "cannot be fitted" if math.isnan(value) else ""
    note = "no better than chance" if math.isinf(value) else note
    losses, errors = (before.log_loss, after.log_loss), (before.ece, after.ece)
    return Temperature(value, losses, errors, note)


def fit_temperature(margins: Margins) -> float:
    """The T > 0 that minimises the mean of -log sigmoid(margin / T).

    Infinity if the mean margin is not above zero (chance does better than any T). NaN if nothing is wrong,
    because then a smaller T is always better, and if all margins are zero.
    """
    margins = margins.astype(np.float64)
    if not np.any(margins):
        return math.nan
    if margins.mean() <= 0:
        return math.inf
    if margins.min() >= 0:
        return math.nan

    # in s = 1/T the loss is convex, so its slope has one root
    def slope(s: float) -> float:
        return float(np.mean(-margins * expit(-s * margins)))

    # double the bracket until the slope changes its sign: a wrong margin finally makes the loss rise
    high = 1.0 / float(np.abs(margins).max())
    while slope(high) < 0:
        high *= 2
    return 1 / float(brentq(slope, 0.0, high, xtol=1e-15 * high, rtol=1e-15))


def length_bias(
    margins: Margins,
    chosen_lengths: Lengths,
    rejected_lengths: Lengths,
    prompts: PromptKeys | None = None,
) -> LengthEffects:
    """Accuracy by length ratio, and the two baselines that look at length only."""
    chosen, rejected = chosen_lengths.astype(np.float64), rejected_lengths.astype(np.float64)
    difference = chosen - rejected
    # bands of longer / shorter with a sign, so that swapping the two sides mirrors the slices
    # an empty response counts as one character
    ratio = np.maximum(chosen, rejected) / np.maximum(np.minimum(chosen, rejected), 1)
    band = np.sign(difference) * np.digitize(ratio, LENGTH_BANDS, right=True)
    slices = {}
    for which, name in enumerate(LENGTH_SLICES, -len(LENGTH_BANDS)):
        rows = band == which
        slices[name] = pairwise_accuracy(margins[rows], None if prompts is None else prompts[rows])
    return LengthEffects(
        slices,
        pick_longer=pairwise_accuracy(difference, prompts),
        pick_shorter=pairwise_accuracy(-difference, prompts),
    )


def mean(values: Num[np.ndarray, " items"]) -> float:
    """The mean; NaN of nothing."""
    return float(values.mean()) if len(values) else math.nan
