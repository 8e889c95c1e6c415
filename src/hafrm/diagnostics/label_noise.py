"""Which labels may be wrong, and which comparisons to read.

Several seeds or methods vote, with the mean and the spread of their margins as in arXiv 2401.06080. Models
that disagree point at hard comparisons; models that all contradict the label point at labels to check. If
annotators' votes are known, both are tested: do they predict split votes? Margins are divided by each
model's root mean square, which makes models comparable and changes no sign.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Shaped
from numpy.typing import NDArray

from hafrm.evaluation.comparisons import Comparisons, Indices, Margins, PromptKeys
from hafrm.preferences import Message
from hafrm.statistics import SEED, Estimate, accuracy_interval

NUM_BANDS = 5
"""Of |mean margin|, with equally many comparisons."""
NUM_AUC_RESAMPLES = 1000
MAX_EXAMPLE_CHARS = 400
"""Of each text of an example; a longer one is cut, and says so."""
WRONG = "largest wrong margin"

ModelMargins = Float[np.ndarray, "models comparisons"]
VoteCounts = Float[np.ndarray, "comparisons outcomes"]
"""Annotators for chosen, rejected and tie; NaN if unknown."""


@dataclass(frozen=True, slots=True)
class NoiseBand:
    """The comparisons of one level of disagreement, or of one band of |mean margin|."""

    low: float
    high: float
    num: int
    accuracy: Estimate
    """Of the models' mean margin."""
    split: Estimate
    """Fraction of the comparisons with votes on which annotators were split."""


@dataclass(frozen=True, slots=True)
class Predictor:
    """A number that could predict split votes, and how well it does."""

    name: str
    auc: Estimate
    """Of separating split from unanimous votes; 0.5 is chance, NaN without both kinds."""


@dataclass(frozen=True, slots=True)
class AgainstLabel:
    """The comparisons on which every model prefers the rejected response."""

    fraction: Estimate
    """Of all comparisons."""
    split: Estimate
    """Of these, if votes are known: how often annotators were split."""
    split_others: Estimate
    """The same of the other comparisons."""


@dataclass(frozen=True)
class LabelAudit:
    """What models and votes say about the labels of some comparisons."""

    num: int
    num_with_votes: int
    by_disagreement: tuple[NoiseBand, ...]
    """One for each level that occurs; empty for one model."""
    by_margin: tuple[NoiseBand, ...]
    predictors: tuple[Predictor, ...]
    against: AgainstLabel


@dataclass(frozen=True)
class LabelNoise(LabelAudit):
    """The audit of all comparisons, and how votes are predicted on each source that has some."""

    models: tuple[str, ...]
    by_set: dict[str, tuple[Predictor, ...]]


@dataclass(frozen=True, slots=True)
class WorstExample:
    """One comparison to read."""

    set: str
    prompt: str
    """Its end."""
    chosen: str
    rejected: str
    margin: float
    """The model's own, below zero."""
    votes: tuple[int, int, int] | None
    """For chosen, rejected, tie."""
    why: str


def audit_labels(
    comparisons: Comparisons, margins: ModelMargins, models: Sequence[str]
) -> LabelNoise | None:
    """The audit by all models; None for a single model on data without votes."""
    rows = [[math.nan] * 3 if p.votes is None else list(p.votes) for p in comparisons.pairs]
    votes = np.array(rows, np.float64).reshape(-1, 3)
    if len(models) == 1 and not has_votes(votes).any():
        return None

    def audit_some(some: Indices) -> LabelAudit:
        return audit(margins[:, some], votes[some], comparisons.prompts[some])

    sources = comparisons.by_source().items()
    voted = {name: some for name, some in sources if has_votes(votes[some]).any()}
    whole = audit_some(np.arange(len(comparisons)))
    by_set = {name: audit_some(some).predictors for name, some in voted.items()}
    return LabelNoise(**vars(whole), models=tuple(models), by_set=by_set)


def audit(margins: ModelMargins, votes: VoteCounts, prompts: PromptKeys) -> LabelAudit:
    """The audit of comparisons with each model's margin."""
    voted, split = has_votes(votes), is_split(votes)
    mean, levels = mean_margin(margins), disagreement(margins)

    def fraction_split(rows: NDArray[np.bool_]) -> Estimate:
        rows = rows & voted
        if not rows.any():  # no votes at all leave no interval either
            return Estimate(math.nan, math.nan, math.nan, 0, "wilson")
        return accuracy_interval(split[rows], prompts[rows])

    def band(rows: NDArray[np.bool_], low: float, high: float) -> NoiseBand:
        correct = accuracy_interval(mean[rows] > 0, prompts[rows])
        return NoiseBand(low, high, int(rows.sum()), correct, fraction_split(rows))

    by_level = [band(levels == level, level, level) for level in np.unique(levels).tolist()]
    against = np.all(margins < 0, axis=0)
    return LabelAudit(
        num=len(mean),
        num_with_votes=int(voted.sum()),
        by_disagreement=tuple(by_level) if len(margins) > 1 else (),
        by_margin=tuple(band(*cut) for cut in _bands(np.abs(mean))),
        predictors=tuple(
            Predictor(name, area_under_curve(scores[voted], split[voted], prompts[voted]))
            for name, scores in _predictors(margins).items()
        ),
        against=AgainstLabel(
            fraction=accuracy_interval(against, prompts),
            split=fraction_split(against),
            split_others=fraction_split(~against),
        ),
    )


def disagreement(margins: ModelMargins) -> Margins:
    """Fraction of the models in the minority, 0 to 0.5; a margin of zero is half a vote for each side.

    It does not depend on the label.
    """
    first = np.mean((np.sign(margins) + 1) / 2, axis=0)  # fraction for the chosen response
    # rounded, so that 1/3 of three models is one level whatever the sum's order
    return np.asarray(np.minimum(first, 1 - first).round(12), np.float64)


def mean_margin(margins: ModelMargins) -> Margins:
    """Mean over models of the margins in units of each model's root mean square."""
    return np.asarray(_scaled(margins).mean(axis=0), np.float64)


def has_votes(votes: VoteCounts) -> Bool[np.ndarray, " comparisons"]:
    """Whether votes are known."""
    return np.asarray(~np.isnan(votes).any(axis=1))


def is_split(votes: VoteCounts) -> Bool[np.ndarray, " comparisons"]:
    """Whether annotators voted for more than one outcome, a tie being an outcome; False if unknown."""
    return np.asarray((np.nan_to_num(votes) > 0).sum(axis=1) > 1)


def doubtful(margins: ModelMargins) -> list[int]:
    """Comparisons on which all models contradict the label, the largest mean margin first."""
    against = np.flatnonzero(np.all(margins < 0, axis=0))
    order = np.argsort(mean_margin(margins)[against], kind="stable")
    return [int(index) for index in against[order]]


def area_under_curve(
    scores: Float[np.ndarray, " items"],
    positive: Bool[np.ndarray, " items"],
    clusters: Shaped[np.ndarray, " items"] | None = None,
) -> Estimate:
    """P(a positive item's score is above a negative one's), equal scores half; 0.5 is chance.

    The interval is the percentile one from resampling clusters. NaN if all items are of one kind.
    """
    # ranks are computed once: a resample only changes how often an item counts
    _, rank = np.unique(scores, return_inverse=True)
    labels = np.arange(len(scores)) if clusters is None else clusters
    _, number = np.unique(labels, return_inverse=True)
    value, bounds = _area(rank, positive, np.ones(len(scores))), (math.nan, math.nan)
    num_clusters = int(number.max(initial=-1)) + 1
    if not math.isnan(value) and num_clusters > 1:
        draw = np.random.default_rng(SEED)
        areas = np.empty(NUM_AUC_RESAMPLES)
        for i in range(NUM_AUC_RESAMPLES):
            drawn = draw.integers(0, num_clusters, num_clusters)
            counts = np.bincount(drawn, minlength=num_clusters)
            areas[i] = _area(rank, positive, counts[number].astype(np.float64))
        # a resample of one kind only has no area
        if not np.isnan(areas).all():
            low, high = np.nanquantile(areas, [0.025, 0.975])
            bounds = float(low), float(high)
    return Estimate(value, *bounds, len(scores), "cluster-bootstrap", proportion=False)


def _area(
    rank: NDArray[np.int64], positive: NDArray[np.bool_], weights: NDArray[np.float64]
) -> float:
    """The area if items count by their weights; `rank` numbers distinct scores upwards."""
    above = np.bincount(rank, weights=weights * positive)
    below = np.bincount(rank, weights=weights * ~positive)
    pairs = above.sum() * below.sum()
    if pairs == 0:
        return math.nan
    # each positive is above all negatives of lower rank, and half of those of its own
    return float(np.sum(above * (np.cumsum(below) - below / 2)) / pairs)


def _predictors(margins: ModelMargins) -> dict[str, NDArray[np.float64]]:
    """Numbers that are high if votes should be split; disagreement needs two models."""
    mean, result = mean_margin(margins), {}
    if len(margins) > 1:
        result["disagreement"] = disagreement(margins)
        result["spread of margins"] = np.asarray(_scaled(margins).std(axis=0), np.float64)
    result["low |mean margin|"] = -np.abs(mean)
    result["mean margin against the label"] = -mean
    return result


def _scaled(margins: ModelMargins) -> NDArray[np.float64]:
    size = np.sqrt(np.mean(margins.astype(np.float64) ** 2, axis=1, keepdims=True))
    # a model whose margins are all zero stays at zero
    return np.asarray(margins / np.where(size > 0, size, 1.0), np.float64)


def _bands(sizes: NDArray[np.float64]) -> Iterator[tuple[NDArray[np.bool_], float, float]]:
    """(rows, lowest, highest) of equally filled bands, low to high; equal sizes stay together."""
    if len(sizes):
        steps = np.arange(1, NUM_BANDS + 1) / NUM_BANDS
        uppers = np.unique(np.quantile(sizes, steps, method="inverted_cdf"))
        which = np.searchsorted(uppers, sizes)
        for k in range(len(uppers)):
            rows = which == k
            yield rows, float(sizes[rows].min()), float(sizes[rows].max())


def worst_errors(
    comparisons: Comparisons, margins: ModelMargins, *, num: int = 10
) -> tuple[WorstExample, ...]:
    """The first model's `num` largest wrong margins; with several models, `num` more doubtful labels.

    No two examples share prompt and rejected response: one bad response would otherwise fill the list.
    """
    # a single model that contradicts a label is not evidence against it
    own, several = margins[0], len(margins) > 1
    mean, against = mean_margin(margins), doubtful(margins) if several else []

    def doubt(index: int) -> str:
        return f"all models contradict the label, {-mean[index]:.1f} times as clearly as usual"

    wrong = [int(index) for index in np.argsort(own, kind="stable") if own[index] < 0]
    worst = _distinct(comparisons, wrong, num)
    why = {i: f"{WRONG}; {doubt(i)}" if i in set(against) else WRONG for i in worst}
    more = _distinct(comparisons, [*worst, *against], num + len(worst))[len(worst) :]
    why |= {index: doubt(index) for index in more}
    return tuple(_example(comparisons, own, index, reason) for index, reason in why.items())


def cut_text(text: str, *, end: bool = False, max_chars: int = MAX_EXAMPLE_CHARS) -> str:
    """The text's first (or last) characters, with the number of those that are left out."""
    text = text.strip()
    left_out = len(text) - max_chars
    if left_out <= 0:
        return text
    note = f"[{left_out} more characters]"
    return f"{note} {text[-max_chars:]}" if end else f"{text[:max_chars]} {note}"


def prompt_text(prompt: Sequence[Message]) -> str:
    """A single user message as it is; a conversation with its roles; cut at its start."""
    if len(prompt) == 1 and prompt[0].role == "user":
        return cut_text(prompt[0].content, end=True)
    return cut_text("\n".join(f"{m.role}: {m.content}" for m in prompt), end=True)


def _distinct(comparisons: Comparisons, indices: Sequence[int], num: int) -> list[int]:
    """The first `num` indices, of those with one prompt and rejected response only the first."""
    first: dict[tuple[str, str], int] = {}
    for index in indices:
        if len(first) == num:
            break
        first.setdefault(
            (str(comparisons.prompts[index]), comparisons.rejected_texts[index]), index
        )
    return list(first.values())


def _example(comparisons: Comparisons, margins: Margins, index: int, why: str) -> WorstExample:
    group, votes = comparisons.groups[comparisons.owner[index]], comparisons.pairs[index].votes
    return WorstExample(
        set=group.source,
        prompt=prompt_text(group.prompt),
        chosen=cut_text(comparisons.chosen_texts[index]),
        rejected=cut_text(comparisons.rejected_texts[index]),
        margin=float(margins[index]),
        votes=None if votes is None else (votes.chosen, votes.rejected, votes.tie),
        why=why,
    )
