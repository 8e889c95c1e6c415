"""Weighted means of means, as benchmarks publish them, with intervals that resample prompts.

A benchmark's score is a weighted sum of the means of its *terms* (a subset's accuracy, say). Items that
share a cluster (a prompt, or its translations) are drawn together across terms, and only among clusters
that have items in the same terms, so that every resample has as many clusters of a small subset as the
benchmark. Arrays in, `Estimate` out; nothing here knows models, data or benchmarks.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Shaped
from numpy.typing import NDArray

from hafrm.statistics import SEED, Estimate, accuracy_interval, resample_counts, wilson


@dataclass(frozen=True)
class Term:
    """The items of one mean."""

    values: Float[np.ndarray, " items"]
    """Between 0 (wrong) and 1 (right), or whatever the benchmark averages."""
    clusters: Shaped[np.ndarray, " items"]
    """What dependent items share."""


class TermMeans:
    """The mean of every term, and its resamples, which all terms share."""

    def __init__(self, terms: Mapping[str, Term]) -> None:
        if not terms or any(len(term.values) == 0 for term in terms.values()):
            raise ValueError(f"every term needs an item, got {[*terms]}")
        self.terms = dict(terms)
        sums, sizes = _by_cluster([*self.terms.values()])  # [clusters, terms] each
        self.means = sums.sum(0) / sizes.sum(0)
        self.resamples = _resample(sums, sizes)  # [resamples, terms]
        present = (sizes > 0).astype(np.float64)
        self.num_clusters = present.sum(0)
        # 1 for terms of the same clusters, 0 for terms that share none
        scale = np.sqrt(np.outer(self.num_clusters, self.num_clusters))
        self.overlap = present.T @ present / scale

    def combine(self, weights: Mapping[str, float]) -> Estimate:
        """sum of weight * mean over the named terms, with its interval.

        A single term of right and wrong items has the interval of any accuracy. Otherwise it is the
        bootstrap's, widened for terms whose items are all right or all wrong: a bootstrap takes those as
        certain, Wilson's interval (a cluster one trial) does not. Deviations add in squares as far as the
        terms' clusters differ (Zou and Donner 2008).
        """
        columns = [*map([*self.terms].index, weights)]
        factors = np.array([*weights.values()], np.float64)
        first = self.terms[next(iter(weights))]
        if len(columns) == 1 and factors[0] == 1 and _is_binary(first):
            return accuracy_interval(first.values > 0, first.clusters)
        num = sum(len(self.terms[name].values) for name in weights)
        value = float(self.means[columns] @ factors)
        low, high = np.quantile(self.resamples[:, columns] @ factors, [0.025, 0.975])
        below, above = self._unanimous(columns, factors)
        low = value - math.hypot(max(0.0, value - low), below)
        high = value + math.hypot(max(0.0, high - value), above)
        return Estimate(value, low, high, num, "cluster-bootstrap")

    def _unanimous(
        self, columns: Sequence[int], factors: NDArray[np.float64]
    ) -> tuple[float, float]:
        """How far below and above its value the sum may be, for its terms whose items all agree."""
        terms = [*self.terms.values()]
        gaps = np.zeros((2, len(columns)))  # below, above
        for place, column in enumerate(columns):
            mean = float(self.means[column])
            if _is_binary(terms[column]) and mean in (0.0, 1.0):
                low, high = wilson(mean, float(self.num_clusters[column]))
                gaps[:, place] = mean - low, high - mean
        overlap = self.overlap[np.ix_(columns, columns)]
        # a negative weight swaps below and above
        below, above = np.where(factors < 0, gaps[::-1], gaps) * np.abs(factors)
        return math.sqrt(below @ overlap @ below), math.sqrt(above @ overlap @ above)


def mean_of(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of independent estimates; their deviations add in squares (Zou and Donner 2008)."""
    value = float(np.mean([e.value for e in estimates]))
    below = math.hypot(*((e.value - e.low) / len(estimates) for e in estimates))
    above = math.hypot(*((e.high - e.value) / len(estimates) for e in estimates))
    num = sum(e.num for e in estimates)
    return Estimate(value, value - below, value + above, num, "combined")


def _is_binary(term: Term) -> bool:
    return bool(np.isin(term.values, (0.0, 1.0)).all())


def _by_cluster(terms: Sequence[Term]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """[clusters, terms]: the sum of the values, and the number of items."""
    names, rows = np.unique(np.concatenate([t.clusters for t in terms]), return_inverse=True)
    columns = np.repeat(np.arange(len(terms)), [len(term.values) for term in terms])
    sums, sizes = np.zeros((2, len(names), len(terms)))
    # add.at, because a (cluster, term) may have several items
    np.add.at(sums, (rows, columns), np.concatenate([term.values for term in terms]))
    np.add.at(sizes, (rows, columns), 1.0)
    return sums, sizes


def _resample(
    sums: Float[np.ndarray, "clusters terms"], sizes: Float[np.ndarray, "clusters terms"]
) -> NDArray[np.float64]:
    """[resamples, terms]: the mean of each term in each resample of clusters."""
    draw = np.random.default_rng(SEED)
    totals, counts = np.zeros((2, 1, 1))
    # clusters of the same set of terms are one kind; each kind is resampled by itself
    _, kinds = np.unique(sizes > 0, axis=0, return_inverse=True)
    for kind in range(int(kinds.max()) + 1):
        members = np.flatnonzero(kinds.ravel() == kind)
        blocks = [
            (c @ sums[members], c @ sizes[members]) for c in resample_counts(len(members), draw)
        ]
        total, count = (np.concatenate(column) for column in zip(*blocks, strict=True))
        totals, counts = totals + total, counts + count
    return np.asarray(totals / counts, np.float64)
