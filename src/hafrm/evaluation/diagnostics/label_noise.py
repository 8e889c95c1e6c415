"""Where labels may be wrong: what several models say of the same comparisons, and what people's votes say.

Several seeds or methods vote, with the mean and the spread of their margins as in arXiv
2401.06080. Models that disagree point at comparisons that are hard to tell; models that agree against the
label point at labels to look at again. Where people's votes are known, both are put to the test: do they
predict that people were split? Margins are divided by each model's root mean square, which makes models
comparable and changes no sign.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Shaped
from numpy.typing import NDArray

from hafrm.evaluation.diagnostics.ranking import area_under_curve
from hafrm.evaluation.metrics import Result
from hafrm.statistics import Estimate, accuracy_interval

NUM_BANDS = 5
"""Of |mean margin|, with equally many comparisons."""

Margins = Float[np.ndarray, "models comparisons"]
Votes = Float[np.ndarray, "comparisons outcomes"]
Prompts = Shaped[np.ndarray, " comparisons"]


@dataclass(frozen=True, slots=True)
class NoiseBand(Result):
    """The comparisons of one level of disagreement, or of one band of |mean margin|."""

    low: float
    high: float
    num: int
    accuracy: Estimate
    """Of the models' mean margin."""
    split: Estimate
    """Share of the comparisons with votes on which people were split."""


@dataclass(frozen=True, slots=True)
class Predictor(Result):
    """A number that could predict split votes, and how well it does."""

    name: str
    auc: Estimate
    """Of telling split from unanimous votes; 0.5 is chance, NaN without both kinds."""


@dataclass(frozen=True, slots=True)
class AgainstLabel(Result):
    """The comparisons on which every model prefers the rejected response."""

    share: Estimate
    """Of all comparisons."""
    split: Estimate
    """Of these, where votes are known: how often people were split."""
    split_others: Estimate
    """The same of the other comparisons."""


@dataclass(frozen=True, slots=True)
class Audit(Result):
    """What was found on one set of comparisons."""

    num: int
    num_with_votes: int
    by_disagreement: tuple[NoiseBand, ...]
    """One for each level that occurs; empty for one model."""
    by_margin: tuple[NoiseBand, ...]
    predictors: tuple[Predictor, ...]
    against: AgainstLabel


def audit(margins: Margins, votes: Votes, prompts: Prompts) -> Audit:
    """The audit of comparisons with each model's margin; votes are NaN where unknown."""
    known, split = has_votes(votes), is_split(votes)
    mean, levels = mean_margin(margins), disagreement(margins)

    def band(rows: NDArray[np.bool_], low: float, high: float) -> NoiseBand:
        correct = accuracy_interval(mean[rows] > 0, prompts[rows])
        return NoiseBand(low, high, int(rows.sum()), correct, _share(split, rows & known, prompts))

    by_level = [band(levels == level, level, level) for level in np.unique(levels).tolist()]
    against = np.all(margins < 0, axis=0)
    return Audit(
        num=len(mean),
        num_with_votes=int(known.sum()),
        by_disagreement=tuple(by_level) if len(margins) > 1 else (),
        by_margin=tuple(band(*cut) for cut in _bands(np.abs(mean))),
        predictors=tuple(
            Predictor(name, area_under_curve(scores[known], split[known], prompts[known]))
            for name, scores in _predictors(margins).items()
        ),
        against=AgainstLabel(
            share=accuracy_interval(against, prompts),
            split=_share(split, against & known, prompts),
            split_others=_share(split, ~against & known, prompts),
        ),
    )


def disagreement(margins: Margins) -> Float[np.ndarray, " comparisons"]:
    """Share of the models in the minority, 0 to 0.5; a margin of zero is half a vote for each side.

    It does not know which response people preferred.
    """
    first = np.mean((np.sign(margins) + 1) / 2, axis=0)
    return np.asarray(np.minimum(first, 1 - first).round(12), np.float64)


def mean_margin(margins: Margins) -> Float[np.ndarray, " comparisons"]:
    """Mean over models of the margins in units of each model's root mean square."""
    return np.asarray(_scaled(margins).mean(axis=0), np.float64)


def has_votes(votes: Votes) -> Bool[np.ndarray, " comparisons"]:
    """Where votes are known."""
    return np.asarray(~np.isnan(votes).any(axis=1))


def is_split(votes: Votes) -> Bool[np.ndarray, " comparisons"]:
    """Where judges voted for more than one outcome, a tie being an outcome; False where unknown."""
    return np.asarray((np.nan_to_num(votes) > 0).sum(axis=1) > 1)


def suspicious(margins: Margins, num: int) -> list[int]:
    """Comparisons on which all models are against the label, the largest mean margin first."""
    against = np.flatnonzero(np.all(margins < 0, axis=0))
    order = np.argsort(mean_margin(margins)[against], kind="stable")
    return [int(row) for row in against[order][:num]]


def _predictors(margins: Margins) -> dict[str, NDArray[np.float64]]:
    """Numbers that are high where votes should be split; disagreement takes two models to exist."""
    mean, found = mean_margin(margins), {}
    if len(margins) > 1:
        found["disagreement"] = disagreement(margins)
        found["spread of margins"] = np.asarray(_scaled(margins).std(axis=0), np.float64)
    found["low |mean margin|"] = -np.abs(mean)
    found["mean margin against the label"] = -mean
    return found


def _scaled(margins: Margins) -> NDArray[np.float64]:
    size = np.sqrt(np.mean(margins.astype(np.float64) ** 2, axis=1, keepdims=True))
    return np.asarray(margins / np.where(size > 0, size, 1.0), np.float64)


def _share(true: NDArray[np.bool_], rows: NDArray[np.bool_], prompts: Prompts) -> Estimate:
    """Share of `true` in `rows`; for no rows NaN, and no interval either."""
    if not rows.any():
        return Estimate(math.nan, math.nan, math.nan, 0, "wilson")
    return accuracy_interval(true[rows], prompts[rows])


def _bands(sizes: NDArray[np.float64]) -> Sequence[tuple[NDArray[np.bool_], float, float]]:
    """(rows, lowest, highest) of equally filled bands, low to high; equal sizes stay together."""
    if len(sizes) == 0:
        return []
    steps = np.arange(1, NUM_BANDS + 1) / NUM_BANDS
    uppers = np.unique(np.quantile(sizes, steps, method="inverted_cdf"))
    which = np.searchsorted(uppers, sizes)
    parts = [which == k for k in range(len(uppers))]
    return [(rows, float(sizes[rows].min()), float(sizes[rows].max())) for rows in parts]


@dataclass(frozen=True, slots=True)
class LabelNoise:
    """The audit of all comparisons, and how votes are predicted on each source that has some."""

    models: tuple[str, ...]
    all: Audit
    by_set: dict[str, tuple[Predictor, ...]]

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON. `auc` is disagreement's, or that of a low margin where there is one model."""
        found = self.all.to_dict()
        levels, by_margin = found.pop("by_disagreement"), found["by_margin"]
        for band in (*levels, *by_margin):
            band["vote_split"] = band["split"]["value"]
        return found | {
            "models": list(self.models),
            "by_disagreement": [
                {"disagreement": b["low"]}
                | {k: v for k, v in b.items() if k not in ("low", "high")}
                for b in levels
            ],
            "auc": found["predictors"][0]["auc"]["value"],
            "by_set": {n: [p.to_dict() for p in each] for n, each in self.by_set.items()},
        }
