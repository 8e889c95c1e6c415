"""How sure a number is: `Estimate` with its interval, and paired tests for accuracies and means.

Comparisons of one prompt are not independent, so intervals resample *prompts* (clusters), and models are
compared on the same comparisons. With several seeds two things vary, the prompts and the seed of
training; a difference smaller than that between two seeds of one method is no result. Arrays in, small
frozen results out; every random draw is seeded. Knows nothing of models, data or files.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Num, Shaped
from numpy.typing import NDArray
from scipy import special

from hafrm.results import Real

NUM_RESAMPLES = 2000
"""Enough for the 2.5 % and 97.5 % quantiles to move by less than a tenth of the interval's width."""


Z95 = 1.959963984540054
"""Two-sided 95 % point of the normal distribution."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its confidence interval; NaN where there is nothing to estimate from."""

    value: Real
    low: Real
    high: Real
    num: int
    """Items behind the value (not clusters)."""
    method: str
    """How the interval was made, such as wilson or cluster-bootstrap."""
    confidence: float = 0.95
    proportion: bool = True
    """Whether the value is a fraction (or a difference of fractions), and so printed in per cent."""

    def __str__(self) -> str:
        """The value and its bounds, such as "63.2 % [59.1, 67.2]"; "n/a" for nothing."""
        if math.isnan(self.value):
            return "n/a"
        scale, digits, unit = (100, 1, " %") if self.proportion else (1, 3, "")
        text = f"{scale * self.value:.{digits}f}{unit}"
        if math.isnan(self.low):
            return text
        return f"{text} [{scale * self.low:.{digits}f}, {scale * self.high:.{digits}f}]"


@dataclass(frozen=True, slots=True)
class McNemar:
    """Exact test of whether two models are right equally often, on the comparisons where they differ."""

    num_first_only: int
    """Comparisons that only the first model had right."""
    num_second_only: int
    p_value: float
    """Two-sided; 1.0 where the two never differ."""


def wilson_interval(num_correct: int, num: int, *, confidence: float = 0.95) -> Estimate:
    """Fraction num_correct / num of independent items with Wilson's score interval.

    For num = 0 the value is NaN and the interval is all of [0, 1].
    """
    if not 0 <= num_correct <= num:
        raise ValueError(f"num_correct must lie in 0..num, got {num_correct} of {num}")
    if num == 0:
        return Estimate(math.nan, 0.0, 1.0, 0, "wilson", confidence)
    fraction = num_correct / num
    low, high = wilson(fraction, num, normal_point(confidence))
    return Estimate(fraction, low, high, num, "wilson", confidence)


def normal_point(confidence: float) -> float:
    """The two-sided point of the normal distribution, such as 1.96 for 0.95."""
    return float(special.ndtri((1 + confidence) / 2))


def accuracy_interval(
    correct: Bool[np.ndarray, " items"],
    clusters: Shaped[np.ndarray, " items"] | None = None,
    *,
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Fraction of correct items, with the interval that suits how they are clustered.

    Wilson's where every cluster is one item (or none are given), else the bootstrap over clusters. Where
    all items agree, resampling would give a width of zero: then Wilson's over clusters, each one trial.
    """
    correct = np.asarray(correct, bool)
    num, num_correct = len(correct), int(correct.sum())
    num_clusters = num if clusters is None else len(np.unique(clusters))
    if clusters is None or num_clusters == num:
        return wilson_interval(num_correct, num, confidence=confidence)
    if num_correct in (0, num):
        trials = wilson_interval(
            num_clusters if num_correct else 0, num_clusters, confidence=confidence
        )
        return Estimate(trials.value, trials.low, trials.high, num, "wilson", confidence)
    return clustered_bootstrap(correct, clusters, confidence=confidence, seed=seed)


def clustered_bootstrap(
    values: Shaped[np.ndarray, " items"],
    clusters: Shaped[np.ndarray, " items"] | None = None,
    *,
    confidence: float = 0.95,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
    proportion: bool = True,
) -> Estimate:
    """Mean of the values with the percentile interval from resampling whole clusters.

    Each resample draws as many clusters as there are, with replacement, and takes the mean over all their
    items, so that large prompts count as they do in the value. Without clusters every item is its own.
    Fewer than two clusters give a NaN interval.
    """
    items = np.asarray(values, np.float64)
    if len(items) == 0:
        return _bootstrapped(math.nan, (math.nan, math.nan), 0, confidence, proportion)
    sums, sizes = _cluster_sums(items, clusters)
    if len(sums) < 2:
        return _bootstrapped(
            float(items.mean()), (math.nan, math.nan), len(items), confidence, proportion
        )
    means = _resampled_means(sums, sizes, num_resamples, np.random.default_rng(seed))
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return _bootstrapped(
        float(items.mean()), (float(low), float(high)), len(items), confidence, proportion
    )


def bootstrap_columns(
    values: Float[np.ndarray, "items columns"], *, confidence: float = 0.95, seed: int = 0
) -> tuple[Estimate, ...]:
    """The mean of every column of quantities, with the interval that `clustered_bootstrap` gives it.

    All columns share their resamples, so a curve of many points costs little more than one of them. Every
    item is its own cluster.
    """
    num, columns = values.shape
    if num < 2:
        return tuple(clustered_bootstrap(values[:, k], proportion=False) for k in range(columns))
    draw = np.random.default_rng(seed)
    block = max(1, 4_000_000 // num)
    means = []
    for start in range(0, NUM_RESAMPLES, block):
        rows = min(block, NUM_RESAMPLES - start)
        picked = draw.integers(0, num, (rows, num)) + num * np.arange(rows)[:, None]
        counts = np.bincount(picked.ravel(), minlength=rows * num).reshape(rows, num)
        means.append(counts @ values / num)
    bounds = np.quantile(
        np.concatenate(means), [(1 - confidence) / 2, (1 + confidence) / 2], axis=0
    )
    return tuple(
        _bootstrapped(float(mean), (float(low), float(high)), num, confidence, proportion=False)
        for mean, low, high in zip(values.mean(0), *bounds, strict=True)
    )


def paired_bootstrap(
    first: Shaped[np.ndarray, " items"],
    second: Shaped[np.ndarray, " items"],
    clusters: Shaped[np.ndarray, " items"] | None = None,
    *,
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """mean(first) - mean(second) over the same items, resampled together by cluster.

    With two arrays of correct answers it is the difference of two accuracies; what is hard for both
    cancels, so the interval is narrower than two separate ones suggest.
    """
    difference = np.asarray(first, np.float64) - np.asarray(second, np.float64)
    return clustered_bootstrap(difference, clusters, confidence=confidence, seed=seed)


def cluster_standard_error(
    values: Shaped[np.ndarray, " items"], clusters: Shaped[np.ndarray, " items"] | None = None
) -> float:
    """Standard error of the mean when items of a cluster go together; NaN without items.

    sqrt(sum over clusters of (sum of deviations)^2) / n: Eq. 4 of Miller, arXiv 2411.00640. Without
    clusters it is the usual one (dividing by n, not n - 1).
    """
    items = np.asarray(values, np.float64)
    if len(items) == 0:
        return math.nan
    deviations, _ = _cluster_sums(items - items.mean(), clusters)
    return float(np.sqrt(np.sum(deviations**2)) / len(items))


def cluster_p_value(
    gaps: Float[np.ndarray, " items"], clusters: Shaped[np.ndarray, " items"]
) -> float:
    """Two-sided p-value of a mean of 0, from the standard error by cluster and Student's t."""
    error, degrees = cluster_standard_error(gaps, clusters), len(np.unique(clusters)) - 1
    if error == 0:
        return 1.0 if degrees == 0 or gaps.mean() == 0 else 0.0
    return float(2 * special.stdtr(degrees, -abs(gaps.mean()) / error))


def mcnemar(first: Bool[np.ndarray, " items"], second: Bool[np.ndarray, " items"]) -> McNemar:
    """Exact McNemar test on the correctness of two models on the same items.

    It takes items as independent: with several comparisons per prompt, trust paired_bootstrap instead.
    """
    first, second = np.asarray(first, bool), np.asarray(second, bool)
    first_only, second_only = int(np.sum(first & ~second)), int(np.sum(second & ~first))
    # Under the null each discordant item is a fair coin: twice the lower binomial tail, at most 1.
    tail = special.bdtr(min(first_only, second_only), first_only + second_only, 0.5)
    return McNemar(first_only, second_only, min(1.0, 2 * float(tail)))


def holm(p_values: Float[np.ndarray, " tests"]) -> Float[np.ndarray, " tests"]:
    """Holm's adjusted p-values, in the order given: reject those at most the family's error rate.

    Controls the chance of any false rejection whatever the dependence (Holm 1979).
    """
    p = np.asarray(p_values, np.float64)
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted


def _bootstrapped(
    value: float, bounds: tuple[float, float], num: int, confidence: float, proportion: bool
) -> Estimate:
    return Estimate(value, *bounds, num, "cluster-bootstrap", confidence, proportion)


def _cluster_sums(
    items: Num[np.ndarray, " items"], clusters: Shaped[np.ndarray, " items"] | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sum of the items and number of items of each cluster."""
    if clusters is None:
        return items.astype(np.float64), np.ones(len(items))
    _, index = np.unique(clusters, return_inverse=True)
    sums: NDArray[np.float64] = np.asarray(np.bincount(index, weights=items), np.float64)
    return sums, np.bincount(index).astype(np.float64)


def _resampled_means(
    sums: NDArray[np.float64],
    sizes: NDArray[np.float64],
    num_resamples: int,
    draw: np.random.Generator,
) -> NDArray[np.float64]:
    """The mean over items of each resample of clusters."""
    means = []
    # Blocks of about 4 million draws bound the memory at some 100 MB.
    block = max(1, 4_000_000 // len(sums))
    for start in range(0, num_resamples, block):
        picked = draw.integers(0, len(sums), (min(block, num_resamples - start), len(sums)))
        means.append(sums[picked].sum(1) / sizes[picked].sum(1))
    return np.concatenate(means)


def wilson(fraction: float, num: int | float, z: float = Z95) -> tuple[float, float]:
    """(low, high) of a fraction observed in `num` independent trials (Wilson 1927); [0, 1] for none.

    Unlike p +- z * se it stays inside [0, 1] and has a width at 0 and at 1. `num` need not be whole:
    trials that go together count as fewer.
    """
    if num <= 0:
        return 0.0, 1.0
    # Centre and half-width of the score interval.
    shrink = 1 + z**2 / num
    centre = (fraction + z**2 / (2 * num)) / shrink
    half = z * math.sqrt(fraction * (1 - fraction) / num + z**2 / (4 * num**2)) / shrink
    # The two exact ends, which rounding would miss by 1e-17.
    return (0.0 if fraction == 0 else centre - half), (1.0 if fraction == 1 else centre + half)


def with_bounds(name: str, fraction: float, num: int | float) -> dict[str, float]:
    """A fraction as it is logged: `name`, and its 95 % interval as `name`_low and `name`_high."""
    low, high = wilson(fraction, num)
    return {name: fraction, f"{name}_low": low, f"{name}_high": high}


def in_words(values: Mapping[str, float]) -> str:
    """Logged values as one line, an interval behind its fraction: "loss 0.5  accuracy 0.8 [0.7, 0.87]"."""
    parts = []
    for name, value in values.items():
        if name.removesuffix("_low") in values and name.endswith("_low"):
            continue
        if name.removesuffix("_high") in values and name.endswith("_high"):
            continue
        low, high = values.get(f"{name}_low"), values.get(f"{name}_high")
        bounds = "" if low is None or high is None else f" [{low:.3f}, {high:.3f}]"
        parts.append(f"{name} {value:.4g}{bounds}")
    return "  ".join(parts)


SEEDS_METHOD = "t over prompts and seeds"


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
    return Estimate(mean, low, high, values.shape[1], SEEDS_METHOD, confidence, proportion)


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
    estimate = Estimate(mean, *ends, first.shape[1], SEEDS_METHOD, confidence, proportion)
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
    values = np.array([e.value for e in estimates])
    some, mean = estimates[0], float(values.mean())
    point = _t_point(some.confidence, float(len(values) - 1))
    spread = point * float(values.std(ddof=1)) / math.sqrt(len(values))
    low = mean - math.hypot(float(np.mean([e.value - e.low for e in estimates])), spread)
    high = mean + math.hypot(float(np.mean([e.high - e.value for e in estimates])), spread)
    if some.proportion:
        low, high = max(0.0, low), min(1.0, high)
    return Estimate(mean, low, high, some.num, SEEDS_METHOD, some.confidence, some.proportion)


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
