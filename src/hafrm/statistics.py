"""`Estimate`, a number with its confidence interval, and the tests that compare two models.

Comparisons of one prompt are not independent, so intervals resample whole prompts (clusters), and models
are compared on the same comparisons. With several training seeds the intervals include their variation.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
from jaxtyping import Bool, Float, Int, Num, Shaped
from numpy.typing import NDArray
from pydantic import BeforeValidator
from scipy import special

Real = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]
"""A float field that may be nan, which is null in JSON, for results that are read back."""
NUM_RESAMPLES = 2000  # the bounds then move by less than a tenth of the interval's width
SEED = 0
Z95 = 1.959963984540054  # two-sided 95 % point of the normal distribution
SEEDS_METHOD = "t over prompts and seeds"


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its 95 % confidence interval; NaN if there is nothing to estimate from."""

    value: Real
    low: Real
    high: Real
    num: int  # items behind the value (not clusters)
    method: str  # how the interval was made, such as wilson or cluster-bootstrap
    proportion: bool = True  # a fraction or a difference of fractions, printed in percent

    def __str__(self) -> str:
        """Such as "63.2 % [59.1, 67.2]"; "n/a" for NaN."""
        if math.isnan(self.value):
            return "n/a"
        scale, digits, unit = (100, 1, " %") if self.proportion else (1, 3, "")
        text = f"{scale * self.value:.{digits}f}{unit}"
        if math.isnan(self.low):
            return text
        return f"{text} [{scale * self.low:.{digits}f}, {scale * self.high:.{digits}f}]"


@dataclass(frozen=True, slots=True)
class Difference:
    """A difference of two means, and the two-sided p-value of the hypothesis that there is none."""

    estimate: Estimate
    p_value: float


def wilson(fraction: float, num: int | float, z: float = Z95) -> tuple[float, float]:
    """(low, high) of a fraction observed in `num` independent trials (Wilson 1927); [0, 1] for none."""
    if num <= 0:
        return 0.0, 1.0
    # unlike p +- z * se, centre and half-width of the score interval stay inside [0, 1]
    shrink = 1 + z**2 / num
    centre = (fraction + z**2 / (2 * num)) / shrink
    half = z * math.sqrt(fraction * (1 - fraction) / num + z**2 / (4 * num**2)) / shrink
    # set both ends exactly; rounding would miss them by 1e-17
    return (0.0 if fraction == 0 else centre - half), (1.0 if fraction == 1 else centre + half)


def accuracy_interval(
    correct: Bool[np.ndarray, " items"], clusters: Shaped[np.ndarray, " items"] | None = None
) -> Estimate:
    """Fraction of correct items; Wilson's interval if no two share a cluster, else the bootstrap's.

    If all items agree, the bootstrap would have width zero: it is Wilson's then, with clusters as trials.
    """
    correct = np.asarray(correct, bool)
    num, num_correct = len(correct), int(correct.sum())
    num_clusters = num if clusters is None else len(np.unique(clusters))
    if num_clusters == num or num_correct in (0, num):
        fraction = num_correct / num if num else math.nan
        return Estimate(fraction, *wilson(fraction, num_clusters), num, "wilson")
    return clustered_bootstrap(correct, clusters)


def clustered_bootstrap(
    values: Shaped[np.ndarray, " items"],
    clusters: Shaped[np.ndarray, " items"] | None = None,
    *,
    proportion: bool = True,
) -> Estimate:
    """Mean of the values with the percentile interval from resampling whole clusters (NaN for < 2)."""
    sums, sizes = _cluster_sums(np.asarray(values, np.float64), clusters)
    return _bootstrap(sums[:, None], sizes, proportion=proportion)[0]


def bootstrap_columns(values: Float[np.ndarray, "items columns"]) -> tuple[Estimate, ...]:
    """The mean of every column of quantities, with the interval of `clustered_bootstrap`."""
    # all columns share their resamples, so a curve of many points costs little more than a single point
    return _bootstrap(values, np.ones(len(values)), proportion=False)


def paired_bootstrap(
    first: Shaped[np.ndarray, " items"],
    second: Shaped[np.ndarray, " items"],
    clusters: Shaped[np.ndarray, " items"] | None = None,
) -> Estimate:
    """mean(first) - mean(second) over the same items, resampled together by cluster."""
    # items that are hard for both cancel, so it is narrower than two separate intervals suggest
    return clustered_bootstrap(np.subtract(first, second, dtype=np.float64), clusters)


def resample_counts(
    num: int, draw: np.random.Generator
) -> Iterator[Int[np.ndarray, "resamples clusters"]]:
    """How often each of `num` clusters is drawn in NUM_RESAMPLES resamples, in blocks of resamples."""
    # blocks of about 4 million draws bound the memory at about 100 MB
    block = max(1, 4_000_000 // num)
    for start in range(0, NUM_RESAMPLES, block):
        rows = min(block, NUM_RESAMPLES - start)
        drawn = draw.integers(0, num, (rows, num)) + num * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * num).reshape(rows, num)


def cluster_standard_error(
    values: Shaped[np.ndarray, " items"], clusters: Shaped[np.ndarray, " items"] | None = None
) -> float:
    """Standard error of the mean of clustered items (dividing by n, not n - 1); NaN without items."""
    items = np.asarray(values, np.float64)
    if len(items) == 0:
        return math.nan
    # sqrt(sum over clusters of (sum of deviations)^2) / n: Eq. 4 of Miller, arXiv 2411.00640
    deviations, _ = _cluster_sums(items - items.mean(), clusters)
    return float(np.sqrt(np.sum(deviations**2)) / len(items))


def cluster_p_value(
    gaps: Float[np.ndarray, " items"], clusters: Shaped[np.ndarray, " items"]
) -> float:
    """Two-sided p-value of a mean of 0, from the clustered standard error and Student's t."""
    error, degrees = cluster_standard_error(gaps, clusters), len(np.unique(clusters)) - 1
    # one prompt says nothing about another
    return 1.0 if degrees == 0 else _t_test(float(gaps.mean()), error, degrees)


def mcnemar(first: Bool[np.ndarray, " items"], second: Bool[np.ndarray, " items"]) -> float:
    """Two-sided p-value of McNemar's exact test of whether two models are right equally often.

    It assumes independent items: with several comparisons per prompt, use `cluster_p_value` instead.
    """
    first_only, second_only = int(np.sum(first & ~second)), int(np.sum(second & ~first))
    # under the null each discordant item is a fair coin: twice the lower binomial tail, at most 1
    tail = special.bdtr(min(first_only, second_only), first_only + second_only, 0.5)
    return min(1.0, 2 * float(tail))


def holm(p_values: Float[np.ndarray, " tests"]) -> Float[np.ndarray, " tests"]:
    """Adjusted p-values in the same order: reject those up to the family's error rate (Holm 1979)."""
    p = np.asarray(p_values, np.float64)
    # the k-th smallest of n is multiplied by n - k + 1, and never falls below the one before
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted


def with_bounds(name: str, fraction: float, num: int | float) -> dict[str, float]:
    """A fraction to log: `name`, and its 95 % interval as `name`_low and `name`_high."""
    low, high = wilson(fraction, num)
    return {name: fraction, f"{name}_low": low, f"{name}_high": high}


def in_words(values: Mapping[str, float]) -> str:
    """Logged values as one line, each interval after its fraction: "loss 0.5  accuracy 0.8 [0.7, 0.87]"."""
    bounds = {f"{name}{end}" for name in values for end in ("_low", "_high")} & values.keys()
    parts = []
    for name in (n for n in values if n not in bounds):
        ends = [values[f"{name}{end}"] for end in ("_low", "_high") if f"{name}{end}" in values]
        interval = f" [{ends[0]:.3f}, {ends[1]:.3f}]" if len(ends) == 2 else ""
        parts.append(f"{name} {values[name]:.4g}{interval}")
    return "  ".join(parts)


def seeded_mean(
    values: Shaped[np.ndarray, "seeds items"],
    clusters: Shaped[np.ndarray, " items"] | None = None,
    *,
    proportion: bool = True,
) -> Estimate:
    """The mean over (at least two) seeds and items, with an interval for another seed on other prompts."""
    estimate = seeded_sum((values,), clusters, proportion=proportion).estimate
    if not proportion:
        return estimate
    low, high = max(0.0, estimate.low), min(1.0, estimate.high)
    if low == high and low in (0.0, 1.0):  # all agree, which says little about other prompts
        low, high = wilson(low, values.shape[1] if clusters is None else len(np.unique(clusters)))
    return replace(estimate, low=low, high=high)


def seeded_difference(
    first: Shaped[np.ndarray, "first_seeds items"],
    second: Shaped[np.ndarray, "second_seeds items"],
    clusters: Shaped[np.ndarray, " items"] | None = None,
    *,
    proportion: bool = True,
) -> Difference:
    """mean(first) - mean(second) on the same items; the seeds of the two sides are not paired."""
    return seeded_sum((first, -np.asarray(second, np.float64)), clusters, proportion=proportion)


def _bootstrap(
    sums: Num[np.ndarray, "clusters columns"],
    sizes: Float[np.ndarray, " clusters"],
    *,
    proportion: bool,
) -> tuple[Estimate, ...]:
    num, columns = int(sizes.sum()), sums.shape[1]
    means = sums.sum(0) / num if num else np.full(columns, math.nan)
    bounds = np.full((2, columns), math.nan)
    if len(sums) > 1:
        blocks = resample_counts(len(sums), np.random.default_rng(SEED))
        # c has one row per resample, with how often each cluster is in it
        resampled = np.concatenate([(c @ sums) / (c @ sizes)[:, None] for c in blocks])
        bounds = np.quantile(resampled, [0.025, 0.975], axis=0)
    return tuple(
        Estimate(float(mean), float(low), float(high), num, "cluster-bootstrap", proportion)
        for mean, low, high in zip(means, *bounds, strict=True)
    )


def _cluster_sums(
    items: Num[np.ndarray, " items"], clusters: Shaped[np.ndarray, " items"] | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if clusters is None:
        return items.astype(np.float64), np.ones(len(items))
    _, index = np.unique(clusters, return_inverse=True)
    sums = np.bincount(index, weights=items).astype(np.float64)
    return sums, np.bincount(index).astype(np.float64)


def seeded_sum(
    sides: Sequence[Shaped[np.ndarray, "_ items"]],
    clusters: Shaped[np.ndarray, " items"] | None,
    *,
    proportion: bool = True,
) -> Difference:
    """The sum of the sides' means over seeds and items, and whether it differs from 0. All sides have the
    same items, each has its own seeds."""
    if any(len(side) < 2 for side in sides):
        raise ValueError("an interval over seeds needs at least two seeds on each side")
    values = [np.asarray(side, np.float64) for side in sides]
    items = np.sum([side.mean(0) for side in values], axis=0)
    num_clusters = len(items) if clusters is None else len(np.unique(clusters))
    if num_clusters < 2:  # one prompt says nothing about another
        mean = float(items.mean())
        return Difference(
            Estimate(mean, math.nan, math.nan, len(items), SEEDS_METHOD, proportion), 1.0
        )
    over_prompts = cluster_standard_error(items, clusters) ** 2
    over_prompts *= num_clusters / (num_clusters - 1)  # from n to n - 1 in the denominator
    # variance over prompts (of items' means over seeds), plus over each side's seeds (of seeds' means); the
    # interaction of seed and prompt is in both, so the interval is rather too wide
    parts = [(over_prompts, num_clusters - 1)]
    parts += [(float(side.mean(1).var(ddof=1)) / len(side), len(side) - 1) for side in values]
    # Welch-Satterthwaite: V^2 / sum(V_i^2 / df_i)
    variance = sum(part for part, _ in parts)
    spread = sum(part**2 / free for part, free in parts if part)
    degrees = variance**2 / spread if spread else math.inf
    # two-sided 95 % point
    point = Z95 if math.isinf(degrees) else float(special.stdtrit(degrees, 0.975))
    mean, half = float(items.mean()), point * math.sqrt(variance)
    estimate = Estimate(mean, mean - half, mean + half, len(items), SEEDS_METHOD, proportion)
    return Difference(estimate, _t_test(mean, math.sqrt(variance), degrees))


def _t_test(mean: float, error: float, degrees: int | float) -> float:
    if error == 0:
        return 1.0 if mean == 0 else 0.0
    return float(2 * special.stdtr(degrees, -abs(mean) / error))


def effective_rank(fractions: Float[np.ndarray, " directions"]) -> float:
    """exp of the entropy of a `spectrum`; NaN for that of a constant."""
    p = fractions[fractions > 0]
    # Roy and Vetterli (2007) use singular values as p; these are their squares, so the rank is lower
    return float(np.exp(-np.sum(p * np.log(p)))) if len(p) else math.nan


def spectrum(states: Float[np.ndarray, "responses hidden"]) -> Float[np.ndarray, " directions"]:
    """Eigenvalues of the covariance as fractions of their sum, largest first; empty for a constant."""
    centred = states.astype(np.float64) - states.mean(axis=0, dtype=np.float64)
    # squared singular values are the covariance's eigenvalues, up to a factor
    values = np.linalg.svd(centred, compute_uv=False) ** 2
    total = values.sum()
    # rounding around the mean of equal states is no variance
    if total <= (1e-12 * np.abs(states).max(initial=0.0)) ** 2 * states.size:
        return np.empty(0)
    return np.asarray(values / total, np.float64)


ALARM_LINES = 10  # lines of kind train that an alarm looks at, to separate a mean from noise


def training_alarms(
    lines: Sequence[Mapping[str, int | float]], warmup: float
) -> Iterator[tuple[str, str]]:
    """What to warn about after the last of the `lines` (train and validation), as (name, text with what to
    try). Lines up to step `warmup` do not count; training lines count once there are ALARM_LINES."""
    lines = [line for line in lines if line["step"] > warmup]
    validated = [line for line in lines if "repeated_wins" in line]
    if validated and validated[-1]["repeated_wins_low"] > 0.5:
        yield (
            "repeated",
            f"one token, repeated, gets more reward than {validated[-1]['repeated_wins']:.0%} of chosen "
            "responses, which RLHF would find: train longer, or add rejected responses that repeat one",
        )
    ranks = [line["effective_rank"] for line in validated if "effective_rank" in line]
    if ranks and ranks[-1] < max(ranks) / 3:
        yield (
            "spread",
            f"the effective rank of the states that rewards are read from fell from {max(ranks):.3g} "
            f"to {ranks[-1]:.3g}: lower training.learning_rate",
        )
    lines = [line for line in lines if "reward_loss" in line]
    if len(lines) < ALARM_LINES:
        return

    def means(name: str) -> NDArray[np.float64]:
        return np.array([line.get(name, 0.0) for line in lines], np.float64)

    def noise(values: NDArray[np.float64]) -> float:
        return 2.0 * float(values.std(ddof=1)) / math.sqrt(len(values))

    loss, accuracy = means("reward_loss")[-ALARM_LINES:], means("accuracy")[-ALARM_LINES:]
    # at most 0.02, or the noise of tiny batches would hide what is learned
    is_chance = loss.mean() > math.log(2) - min(0.02, noise(loss))
    if is_chance and accuracy.mean() < 0.5 + max(0.02, noise(accuracy)):
        yield (
            "chance",
            f"the reward loss stays at {loss.mean():.3f}, no better than chance (ln 2 = 0.693): raise "
            "training.learning_rate, or look for swapped or random labels (hafrm data)",
        )
    margins = np.convolve(means("margin"), np.full(ALARM_LINES, 1 / ALARM_LINES), "valid")
    if margins.max() > 0.1 and margins[-1] < 0.1 * margins.max():
        yield (
            "margin",
            f"the mean margin fell from {margins.max():.3g} to {margins[-1]:.3g}, rewards collapse: lower "
            "training.learning_rate, and export the best step rather than the last",
        )
    equal = float(means("equal_rewards")[-ALARM_LINES:].mean())
    if equal > 0.05:
        yield (
            "equal",
            f"{equal:.0%} of comparisons have two equal rewards, which accuracy counts as wrong: look for "
            "responses that data.max_length cuts to the same tokens, or set training.precision: fp32",
        )
