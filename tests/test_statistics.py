"""Intervals, tests and seeds as a factor: by hand, against SciPy, slow loops and simulation."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from hafrm.statistics import (
    Estimate,
    accuracy_interval,
    cluster_standard_error,
    clustered_bootstrap,
    holm,
    in_words,
    mcnemar,
    paired_bootstrap,
    seeded_difference,
    seeded_mean,
    seeded_sum,
    wilson,
    with_bounds,
)


def test_a_fraction_is_printed_in_per_cent_and_a_mean_as_it_is() -> None:
    assert str(Estimate(0.632, 0.591, 0.672, 500, "wilson")) == "63.2 % [59.1, 67.2]"
    estimate = Estimate(0.632, 0.5, 0.7654, 9, "cluster-bootstrap", proportion=False)
    assert str(estimate) == "0.632 [0.500, 0.765]"
    assert str(accuracy_interval(np.zeros(0, bool))) == "n/a"
    assert str(Estimate(0.5, math.nan, math.nan, 1, "cluster-bootstrap")) == "50.0 %"


def test_a_logged_fraction_has_its_bounds_and_is_printed_with_them() -> None:
    """80 of 100: Wilson's bounds are 0.7112 and 0.8666."""
    values = {"loss": 0.51234, **with_bounds("accuracy", 0.8, 100), "margin": 2.0}
    assert list(values) == ["loss", "accuracy", "accuracy_low", "accuracy_high", "margin"]
    assert in_words(values) == "loss 0.5123  accuracy 0.8 [0.711, 0.867]  margin 2"
    assert in_words({"fever_low": 36.5}) == "fever_low 36.5"


@pytest.mark.parametrize(("correct", "num"), [(0, 7), (3, 7), (7, 7), (632, 1000), (1, 1)])
def test_wilson_equals_scipy(correct: int, num: int) -> None:
    got = accuracy_interval(np.arange(num) < correct)
    expected = stats.binomtest(correct, num).proportion_ci(0.95, method="wilson")
    assert got.value == correct / num
    assert (got.low, got.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert (got.low, got.high) == wilson(correct / num, num)
    assert got == accuracy_interval(np.arange(num) < correct, np.arange(num))
    # the two ends are exact; without items everything is possible
    assert (wilson(0.0, num)[0], wilson(1.0, num)[1], wilson(0.0, 0)) == (0.0, 1.0, (0.0, 1.0))


def test_repeated_prompts_take_the_clustered_bootstrap() -> None:
    correct = np.array([True, False] * 20)
    got = accuracy_interval(correct, np.repeat(np.arange(20), 2))
    assert got.method == "cluster-bootstrap"
    # Every prompt is half right, so resampling prompts never moves the share.
    assert (got.value, got.low, got.high) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("right", [True, False])
def test_unanimous_items_keep_an_honest_width(right: bool) -> None:
    """Eight items of four prompts all right: the bootstrap would say [1, 1]; four trials say less."""
    got = accuracy_interval(np.full(8, right), np.repeat(np.arange(4), 2))
    assert (got.value, got.low, got.high, got.num) == (right, *wilson(float(right), 4), 8)


def clusters_and_values(num_clusters: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Items that share half their variance with the others of their cluster; sizes 1 to 6."""
    draw = np.random.default_rng(seed)
    clusters = np.repeat(np.arange(num_clusters), draw.integers(1, 7, num_clusters))
    shared = draw.normal(size=num_clusters)[clusters]
    return clusters, shared + draw.normal(size=len(clusters))


def test_the_bootstrap_equals_a_slow_loop_in_distribution() -> None:
    """A loop that rebuilds each resample item by item, with other draws, gives the same quantiles."""
    clusters, values = clusters_and_values(60, seed=0)
    got = clustered_bootstrap(values, clusters, proportion=False)
    draw = np.random.default_rng(99)
    means = []
    for _ in range(2000):
        picked = draw.choice(60, 60)
        means.append(np.concatenate([values[clusters == c] for c in picked]).mean())
    low, high = np.quantile(means, [0.025, 0.975])
    width = high - low
    assert got.value == pytest.approx(values.mean())
    assert got.low == pytest.approx(low, abs=0.05 * width)
    assert got.high == pytest.approx(high, abs=0.05 * width)


def test_the_bootstrap_of_two_clusters_by_hand() -> None:
    """Clusters {1, 1, 1} and {0}: resamples are AA (1), AB or BA (3/4), BB (0), with 1/4, 1/2, 1/4."""
    got = clustered_bootstrap(np.array([1, 1, 1, 0]), np.array(["a", "a", "a", "b"]))
    assert (got.value, got.low, got.high) == (0.75, 0.0, 1.0)
    alone = clustered_bootstrap(np.array([1.0, 0.0]), np.array([7, 7]))
    assert (alone.value, math.isnan(alone.low)) == (0.5, True)


def test_blocks_of_resamples_do_not_change_the_result() -> None:
    """Six million draws make two blocks; one block of them all gives the same interval."""
    values = np.random.default_rng(0).normal(size=3000)
    first = clustered_bootstrap(values)
    draw = np.random.default_rng(0)
    means = values[draw.integers(0, 3000, (2000, 3000))].mean(1)
    assert (first.low, first.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])))


def test_the_paired_bootstrap_swaps_sign_with_its_arguments() -> None:
    draw = np.random.default_rng(1)
    first, second = draw.random((2, 90)) < 0.6
    itself = paired_bootstrap(first, first)
    assert (itself.value, itself.low, itself.high) == (0.0, 0.0, 0.0)
    there, back = paired_bootstrap(first, second), paired_bootstrap(second, first)
    assert (there.value, there.low, there.high) == pytest.approx(
        (-back.value, -back.high, -back.low)
    )


@pytest.mark.parametrize(("first_only", "second_only"), [(0, 0), (5, 5), (1, 9), (9, 1), (40, 61)])
def test_mcnemar_equals_the_exact_binomial_test(first_only: int, second_only: int) -> None:
    first = np.array([True] * first_only + [False] * second_only + [True] * 3 + [False] * 2)
    second = np.array([False] * first_only + [True] * second_only + [True] * 3 + [False] * 2)
    discordant = first_only + second_only
    expected = stats.binomtest(first_only, discordant).pvalue if discordant else 1.0
    assert mcnemar(first, second) == pytest.approx(expected, rel=1e-10)


def test_the_cluster_standard_error_equals_a_double_loop() -> None:
    """Sum of the products of deviations over all pairs of items in one cluster."""
    clusters, values = clusters_and_values(12, seed=4)
    deviations = values - values.mean()
    total = sum(
        deviations[i] * deviations[j]
        for i, j in itertools.product(range(len(values)), repeat=2)
        if clusters[i] == clusters[j]
    )
    got = cluster_standard_error(values, clusters)
    assert got == pytest.approx(math.sqrt(total) / len(values))
    usual = values.std() / math.sqrt(len(values))
    assert cluster_standard_error(values) == pytest.approx(usual)
    assert math.isnan(cluster_standard_error(np.zeros(0)))


def test_holm_by_hand() -> None:
    """Sorted 0.01, 0.03, 0.04 times 3, 2, 1: 0.03, 0.06, 0.04; never below the one before: 0.06."""
    got = holm(np.array([0.04, 0.01, 0.03]))
    assert got.tolist() == pytest.approx([0.06, 0.03, 0.06])
    assert holm(np.array([0.9, 0.8])).tolist() == [1.0, 1.0]
    assert holm(np.zeros(0)).shape == (0,)


def drawn(seed: int, num_seeds: int = 4, num_items: int = 200, seed_sd: float = 0.05) -> np.ndarray:
    """Right answers of several seeds around 0.7, whose skill differs by `seed_sd`."""
    draw = np.random.default_rng(seed)
    skill = 0.7 + seed_sd * draw.normal(size=(num_seeds, 1))
    return draw.random((num_seeds, num_items)) < skill


def test_the_mean_over_seeds_by_hand() -> None:
    """Seeds of means 1/2 and 1 on two items: per-item means (1, 1/2), mean 3/4.

    Prompts: deviations 1/4, var/n * n/(n-1) = (2/16)/4 * 2 = 1/16. Seeds: var 1/8 over 2 = 1/16.
    Variance 1/8, degrees (1/8)^2 / (1/256 + 1/256) = 2; half-width t(2) * sqrt(1/8), cut to [0, 1].
    """
    got = seeded_mean(np.array([[True, False], [True, True]]))
    half = stats.t.ppf(0.975, 2) * math.sqrt(1 / 8)
    assert got.value == 0.75
    assert (got.low, got.high) == pytest.approx((max(0.0, 0.75 - half), 1.0))
    mean = seeded_mean(np.array([[True, False], [True, True]]), proportion=False)
    assert (mean.low, mean.high) == pytest.approx((0.75 - half, 0.75 + half))


def test_seeds_that_agree_on_everything_have_wilsons_interval_over_prompts() -> None:
    got = seeded_mean(np.ones((3, 8), bool), np.repeat(np.arange(4), 2))
    assert (got.low, got.high) == pytest.approx(wilson(1.0, 4))


def test_prompts_with_several_comparisons_count_once() -> None:
    row = np.repeat(np.random.default_rng(2).random(30) < 0.6, 4)
    clusters = np.repeat(np.arange(30), 4)
    got = seeded_mean(np.tile(row, (2, 1)), clusters)
    expected = stats.t.interval(0.95, 29, row.mean(), stats.sem(row[::4]))
    assert (got.low, got.high) == pytest.approx(expected)


def test_a_difference_swaps_sign_with_its_arguments_and_is_that_of_the_means() -> None:
    first, second = drawn(3), drawn(4, num_seeds=3)
    there, back = seeded_difference(first, second), seeded_difference(second, first)
    assert there.estimate.value == pytest.approx(first.mean() - second.mean())
    assert there.estimate.low == pytest.approx(-back.estimate.high)
    assert there.p_value == pytest.approx(back.p_value)
    assert (there.p_value < 0.05) == (not there.estimate.low <= 0 <= there.estimate.high)
    same = seeded_difference(first, first)
    assert (same.estimate.value, same.p_value) == (0, 1)


def test_a_sum_over_sides_does_not_depend_on_the_numbers_of_their_seeds() -> None:
    """Two studies of two methods on the same items: one difference of means, and its error by hand."""
    rng = np.random.default_rng(5)
    a, b, c, d = (rng.normal(size=(3, 200)) + rng.normal(size=(3, 1)) for _ in range(4))
    pooled = seeded_sum([a / 2, b / 2, -c / 2, -d / 2], None, proportion=False)
    items = (a.mean(0) + b.mean(0) - c.mean(0) - d.mean(0)) / 2
    seeds = sum(side.mean(1).var(ddof=1) / 3 / 4 for side in (a, b, c, d))
    variance = items.var(ddof=1) / 200 + seeds
    free = variance**2 / (
        (items.var(ddof=1) / 200) ** 2 / 199
        + sum((side.mean(1).var(ddof=1) / 3 / 4) ** 2 / 2 for side in (a, b, c, d))
    )
    half = stats.t.ppf(0.975, free) * math.sqrt(variance)
    assert pooled.estimate.high == pytest.approx(items.mean() + half)
    shuffled = seeded_sum(
        [a / 2, b[[2, 0, 1]] / 2, -c[[1, 2, 0]] / 2, -d / 2], None, proportion=False
    )
    assert shuffled.estimate.high == pytest.approx(pooled.estimate.high)


def test_one_prompt_says_nothing_about_another() -> None:
    """Its variance over prompts is not 0 but unknown, whatever rounding leaves of it."""
    for seed in range(20):
        right = np.random.default_rng(seed).random((3, 7)) < 0.6
        estimate = seeded_mean(right, np.zeros(7))
        assert estimate.value == pytest.approx(right.mean())
        assert (estimate.low, estimate.high) == (0.0, 1.0)
        difference = seeded_difference(right, ~right, np.zeros(7))
        assert math.isnan(difference.estimate.low) and difference.p_value == 1.0


def test_one_seed_says_nothing_about_another() -> None:
    with pytest.raises(ValueError, match="at least two seeds"):
        seeded_mean(drawn(0, num_seeds=1))
    with pytest.raises(ValueError, match="at least two seeds"):
        seeded_difference(drawn(0), drawn(0, num_seeds=1))


def test_no_difference_is_found_as_rarely_as_it_says() -> None:
    """Two sides of the same skill: p below 0.05 in at most 5 % of 300 pairs, and 3 standard errors."""
    found = 0
    for seed in range(300):
        first, second = drawn(2 * seed), drawn(2 * seed + 1)
        found += seeded_difference(first, second).p_value < 0.05
    assert found / 300 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 300)
