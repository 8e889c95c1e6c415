"""Weighted means of means, as benchmarks publish them, with intervals that resample prompts.

A benchmark's score is a weighted sum of the means of its *terms* (a subset's accuracy, say). Items that
share a cluster (a prompt, or its translations) are drawn together, across terms, and only among clusters
that have items in the same terms, so that a small subset is as large in every resample as it is. Arrays
in, `Estimate` out; knows nothing of models, data or benchmarks.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, Shaped
from numpy.typing import NDArray

from hafrm.statistics import (
    NUM_RESAMPLES,
    Estimate,
    accuracy_interval,
    normal_point,
    wilson,
)


@dataclass(frozen=True)
class Term:
    """The items of one mean."""

    values: Float[np.ndarray, " items"]
    """Between 0 (wrong) and 1 (right), or whatever the benchmark averages."""
    clusters: Shaped[np.ndarray, " items"]
    """What each item shares with those that are not independent of it."""


class TermMeans:
    """The mean of every term, and what resampling makes of them all at once."""

    def __init__(
        self,
        terms: Mapping[str, Term],
        *,
        num_resamples: int = NUM_RESAMPLES,
        seed: int = 0,
    ) -> None:
        if not terms or any(len(term.values) == 0 for term in terms.values()):
            raise ValueError(f"every term needs an item, got {[*terms]}")
        self.terms = dict(terms)
        self.index = {name: column for column, name in enumerate(self.terms)}
        sums, sizes = _by_cluster([*self.terms.values()])
        self.means = sums.sum(0) / sizes.sum(0)
        self.draws = _resample(sums, sizes, num_resamples, np.random.default_rng(seed))
        present = (sizes > 0).astype(np.float64)
        self.num_clusters = present.sum(0)
        # 1 for terms of the same clusters, 0 for terms that share none.
        scale = np.sqrt(np.outer(self.num_clusters, self.num_clusters))
        self.overlap = present.T @ present / scale

    def combine(self, weights: Mapping[str, float], *, confidence: float = 0.95) -> Estimate:
        """sum of weight * mean over the named terms, with its interval.

        A single term of right and wrong items has the interval that any accuracy has. Elsewhere it is the
        bootstrap's, widened for terms whose items are all right or all wrong: resampling takes those for
        certain, Wilson's interval (a cluster one trial) does not. Deviations add up in squares as far as
        the terms' clusters differ (Zou and Donner 2008).
        """
        columns = [self.index[name] for name in weights]
        factors = np.array([*weights.values()], np.float64)
        num = sum(len(self.terms[name].values) for name in weights)
        value = float(self.means[columns] @ factors)
        if len(columns) == 1 and factors[0] == 1 and self._is_binary(next(iter(weights))):
            only = self.terms[next(iter(weights))]
            return accuracy_interval(only.values > 0, only.clusters, confidence=confidence)
        resampled = self.draws[:, columns] @ factors
        low, high = np.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2])
        below, above = self._unanimous([*weights], factors, normal_point(confidence))
        low = value - math.hypot(max(0.0, value - low), below)
        high = value + math.hypot(max(0.0, high - value), above)
        return Estimate(value, low, high, num, "cluster-bootstrap", confidence)

    def _is_binary(self, name: str) -> bool:
        return bool(np.isin(self.terms[name].values, (0.0, 1.0)).all())

    def _unanimous(
        self, names: Sequence[str], factors: NDArray[np.float64], z: float
    ) -> tuple[float, float]:
        """How far below and above its value the sum may be, for its terms whose items all agree."""
        columns = [self.index[name] for name in names]
        gaps = np.zeros((2, len(names)))
        for place, (name, column) in enumerate(zip(names, columns, strict=True)):
            share = float(self.means[column])
            if self._is_binary(name) and share in (0.0, 1.0):
                low, high = wilson(share, float(self.num_clusters[column]), z)
                gaps[:, place] = share - low, high - share
        overlap = self.overlap[np.ix_(columns, columns)]
        # A negative weight turns below and above round.
        below, above = np.where(factors < 0, gaps[::-1], gaps) * np.abs(factors)
        return math.sqrt(below @ overlap @ below), math.sqrt(above @ overlap @ above)


def mean_of(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of independent estimates; their deviations add up in squares (Zou and Donner 2008)."""
    value = float(np.mean([each.value for each in estimates]))
    below = math.hypot(*((each.value - each.low) / len(estimates) for each in estimates))
    above = math.hypot(*((each.high - each.value) / len(estimates) for each in estimates))
    num = sum(each.num for each in estimates)
    confidence = estimates[0].confidence
    return Estimate(value, value - below, value + above, num, "combined", confidence)


def _by_cluster(terms: Sequence[Term]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """[clusters, terms]: the sum of the values, and the number of items."""
    labels = np.concatenate([term.clusters for term in terms])
    names, rows = np.unique(labels, return_inverse=True)
    columns = np.repeat(np.arange(len(terms)), [len(term.values) for term in terms])
    place = rows * len(terms) + columns
    size = len(names) * len(terms)
    values = np.concatenate([term.values for term in terms]).astype(np.float64)
    sums = np.bincount(place, weights=values, minlength=size).reshape(len(names), len(terms))
    sizes = np.bincount(place, minlength=size).reshape(len(names), len(terms))
    return np.asarray(sums, np.float64), sizes.astype(np.float64)


def _resample(
    sums: Float[np.ndarray, "clusters terms"],
    sizes: Float[np.ndarray, "clusters terms"],
    num_resamples: int,
    draw: np.random.Generator,
) -> NDArray[np.float64]:
    """[resamples, terms]: the mean of each term in each resample of clusters."""
    totals = np.zeros((num_resamples, sums.shape[1]))
    counts = np.zeros((num_resamples, sums.shape[1]))
    _, kinds = np.unique(sizes > 0, axis=0, return_inverse=True)
    for kind in range(int(kinds.max()) + 1):
        members = np.flatnonzero(kinds.ravel() == kind)
        # Blocks of about 4 million draws bound the memory at some 100 MB.
        block = max(1, 4_000_000 // len(members))
        for start in range(0, num_resamples, block):
            times = _times_drawn(len(members), min(block, num_resamples - start), draw)
            totals[start : start + block] += times @ sums[members]
            counts[start : start + block] += times @ sizes[members]
    return np.asarray(totals / counts, np.float64)


def _times_drawn(
    num: int, num_resamples: int, draw: np.random.Generator
) -> Int[np.ndarray, "resamples clusters"]:
    """How often each of `num` clusters is among `num` draws with replacement."""
    picked = draw.integers(0, num, (num_resamples, num)) + num * np.arange(num_resamples)[:, None]
    return np.bincount(picked.ravel(), minlength=num_resamples * num).reshape(num_resamples, num)
