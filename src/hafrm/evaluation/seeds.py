"""How sure a mean is that was measured with several seeds on the same prompts.

Two things vary: which prompts were drawn, and which seed a model was trained with. A difference between
two methods that is smaller than that between two seeds of one is no finding, however many prompts there
are. Arrays of [seeds, items] in; knows nothing of models.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Shaped
from scipy import special

from hafrm.evaluation.statistics import Estimate, cluster_standard_error

METHOD = "t over prompts and seeds"


@dataclass(frozen=True, slots=True)
class Difference:
    """A difference of two means, and how surprising it is if there is none."""

    estimate: Estimate
    p_value: float
    """Two-sided."""


def seeded_mean(
    values: Shaped[np.ndarray, "seeds items"],
    clusters: Shaped[np.ndarray, " items"] | None = None,
    *,
    confidence: float = 0.95,
    proportion: bool = True,
) -> Estimate:
    """The mean over seeds and items, with an interval for another seed on other prompts.

    `proportion`: the values are 0 or 1, so the interval ends there. Raises ValueError for fewer than two
    seeds, which say nothing about a third.
    """
    mean, variance, degrees = _moments([values], [1.0], clusters)
    half = _t_point(confidence, degrees) * math.sqrt(variance)
    low, high = mean - half, mean + half
    if proportion:
        low, high = max(0.0, low), min(1.0, high)
    return Estimate(mean, low, high, values.shape[1], METHOD, confidence, proportion)


def seeded_difference(
    first: Shaped[np.ndarray, "first_seeds items"],
    second: Shaped[np.ndarray, "second_seeds items"],
    clusters: Shaped[np.ndarray, " items"] | None = None,
    *,
    confidence: float = 0.95,
    proportion: bool = True,
) -> Difference:
    """mean(first) - mean(second) on the same items; the seeds of the two sides are not paired.

    `proportion`: of shares, and so printed in per cent. Raises ValueError for fewer than two seeds on
    either side.
    """
    mean, variance, degrees = _moments([first, second], [1.0, -1.0], clusters)
    error = math.sqrt(variance)
    half = _t_point(confidence, degrees) * error
    ends = mean - half, mean + half
    estimate = Estimate(mean, *ends, first.shape[1], METHOD, confidence, proportion)
    if error == 0:
        return Difference(estimate, 1.0 if mean == 0 else 0.0)
    return Difference(estimate, float(2 * special.stdtr(degrees, -abs(mean) / error)))


def over_seeds(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of one number over seeds, each with its interval over the same items.

    For numbers that are no plain means, such as a benchmark's score: how far the items leave the number
    open is taken as the mean over seeds, how far the seeds do from their spread (Student's t), and the two
    are added in squares. One estimate is its own.
    """
    if len(estimates) == 1:
        return estimates[0]
    values = np.array([each.value for each in estimates])
    some, mean = estimates[0], float(values.mean())
    point = _t_point(some.confidence, float(len(values) - 1))
    spread = point * float(values.std(ddof=1)) / math.sqrt(len(values))
    low = mean - math.hypot(float(np.mean([each.value - each.low for each in estimates])), spread)
    high = mean + math.hypot(float(np.mean([each.high - each.value for each in estimates])), spread)
    if some.proportion:
        low, high = max(0.0, low), min(1.0, high)
    return Estimate(mean, low, high, some.num, METHOD, some.confidence, some.proportion)


def _moments(
    sides: list[Any], signs: list[float], clusters: Shaped[np.ndarray, " items"] | None
) -> tuple[float, float, float]:
    """The signed sum of the sides' means, its variance, and its degrees of freedom.

    Variance over prompts (by cluster) of the items' means over seeds, plus that over each side's seeds
    of the seeds' means. What seed and prompt do together is in both, so it errs on the wide side. The
    degrees of freedom are Welch's and Satterthwaite's.
    """
    if any(len(side) < 2 for side in sides):
        raise ValueError("an interval over seeds needs at least two seeds on each side")
    values = [np.asarray(side, np.float64) for side in sides]
    signed = list(zip(signs, values, strict=True))
    items = np.sum([sign * side.mean(0) for sign, side in signed], axis=0)
    num_clusters = len(items) if clusters is None else len(np.unique(clusters))
    parts = [(cluster_standard_error(items, clusters) ** 2, num_clusters - 1)]
    if num_clusters > 1:  # from n to n - 1 in the denominator
        parts[0] = (parts[0][0] * num_clusters / (num_clusters - 1), num_clusters - 1)
    parts += [(float(side.mean(1).var(ddof=1)) / len(side), len(side) - 1) for side in values]
    variance = sum(part for part, _ in parts)
    spread = sum(part**2 / free for part, free in parts if part)
    return float(items.mean()), variance, variance**2 / spread if spread else math.inf


def _t_point(confidence: float, degrees: float) -> float:
    """The two-sided point of Student's t."""
    if math.isinf(degrees):
        return float(special.ndtri((1 + confidence) / 2))
    return float(special.stdtrit(degrees, (1 + confidence) / 2))
