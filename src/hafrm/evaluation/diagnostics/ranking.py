"""How well a number ranks what is true above what is not: the area under the ROC curve."""

import math

import numpy as np
from jaxtyping import Bool, Float, Shaped
from numpy.typing import NDArray

from hafrm.statistics import Estimate

NUM_RESAMPLES = 1000


def area_under_curve(
    scores: Float[np.ndarray, " items"],
    positive: Bool[np.ndarray, " items"],
    clusters: Shaped[np.ndarray, " items"] | None = None,
    *,
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """P(a positive item's score is above a negative one's), equal scores half; 0.5 is chance.

    The interval is the percentile one from resampling clusters. NaN where all items are of one kind.
    """
    _, rank = np.unique(scores, return_inverse=True)
    number = (
        np.arange(len(scores)) if clusters is None else np.unique(clusters, return_inverse=True)[1]
    )
    value = _area(rank, positive, np.ones(len(scores)))
    if math.isnan(value):
        return Estimate(
            value, math.nan, math.nan, len(scores), "cluster-bootstrap", confidence, False
        )
    draw, num_clusters = np.random.default_rng(seed), int(number.max()) + 1
    found = []
    for _ in range(NUM_RESAMPLES if num_clusters > 1 else 0):
        picked = np.bincount(draw.integers(0, num_clusters, num_clusters), minlength=num_clusters)
        found.append(_area(rank, positive, picked[number].astype(np.float64)))
    low, high = _bounds(np.array(found), confidence)
    return Estimate(value, low, high, len(scores), "cluster-bootstrap", confidence, False)


def _area(
    rank: NDArray[np.int64], positive: NDArray[np.bool_], weights: NDArray[np.float64]
) -> float:
    """The area where an item counts as often as its weight says; `rank` numbers distinct scores upwards."""
    above = np.bincount(rank, weights=weights * positive)
    below = np.bincount(rank, weights=weights * ~positive)
    pairs = above.sum() * below.sum()
    if pairs == 0:
        return math.nan
    # Each positive is above all negatives of lower rank, and half of those of its own.
    return float(np.sum(above * (np.cumsum(below) - below / 2)) / pairs)


def _bounds(resampled: NDArray[np.float64], confidence: float) -> tuple[float, float]:
    known = resampled[~np.isnan(resampled)]
    if len(known) == 0:
        return math.nan, math.nan
    low, high = np.quantile(known, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
