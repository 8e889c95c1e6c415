"""Intervals and tests against SciPy, slow loops and simulation."""

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
    mcnemar,
    paired_bootstrap,
    wilson_interval,
)

# Printing.


def test_a_share_is_printed_in_per_cent() -> None:
    assert str(Estimate(0.632, 0.591, 0.672, 500, "wilson")) == "63.2 % [59.1, 67.2]"


def test_a_mean_is_printed_as_it_is() -> None:
    estimate = Estimate(0.632, 0.5, 0.7654, 9, "cluster-bootstrap", proportion=False)
    assert str(estimate) == "0.632 [0.500, 0.765]"


def test_no_data_and_no_interval_are_said_so() -> None:
    assert str(wilson_interval(0, 0)) == "n/a"
    assert str(Estimate(0.5, math.nan, math.nan, 1, "cluster-bootstrap")) == "50.0 %"


# Wilson.


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
@pytest.mark.parametrize(("correct", "num"), [(0, 7), (3, 7), (7, 7), (632, 1000), (1, 1)])
def test_wilson_equals_scipy(correct: int, num: int, confidence: float) -> None:
    got = wilson_interval(correct, num, confidence=confidence)
    expected = stats.binomtest(correct, num).proportion_ci(confidence, method="wilson")
    assert got.value == correct / num
    assert (got.low, got.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_by_hand() -> None:
    """50 of 100, z = 1.959964: centre 0.5, half = z sqrt(0.0025 + z^2/40000) / (1 + z^2/100).

    z^2 = 3.841459; sqrt(0.0025 + 0.0000960365) = 0.0509513; * z = 0.0998627; / 1.03841459 = 0.0961685.
    """
    got = wilson_interval(50, 100)
    assert (got.low, got.high) == pytest.approx((0.4038315, 0.5961685), abs=1e-6)


def test_wilson_stays_inside_zero_and_one() -> None:
    assert wilson_interval(0, 10).low == 0.0
    assert wilson_interval(10, 10).high == 1.0
    assert wilson_interval(10, 10).low < 0.8


def test_more_correct_than_items_is_refused() -> None:
    with pytest.raises(ValueError, match="11 of 10"):
        wilson_interval(11, 10)


# The choice of interval.


def test_unclustered_accuracy_takes_wilsons_interval() -> None:
    correct = np.array([True] * 6 + [False] * 4)
    assert accuracy_interval(correct) == wilson_interval(6, 10)
    assert accuracy_interval(correct, np.arange(10)) == wilson_interval(6, 10)


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
    trials = wilson_interval(4 if right else 0, 4)
    assert (got.value, got.low, got.high, got.num) == (float(right), trials.low, trials.high, 8)


def test_no_items_are_not_an_error() -> None:
    got = accuracy_interval(np.zeros(0, bool), np.zeros(0, int))
    assert math.isnan(got.value)
    assert (got.low, got.high) == (0.0, 1.0)


# The bootstrap.


def clusters_and_values(num_clusters: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Items that share half their variance with the others of their cluster; sizes 1 to 6."""
    draw = np.random.default_rng(seed)
    clusters = np.repeat(np.arange(num_clusters), draw.integers(1, 7, num_clusters))
    shared = draw.normal(size=num_clusters)[clusters]
    return clusters, shared + draw.normal(size=len(clusters))


def test_the_bootstrap_equals_a_slow_loop_in_distribution() -> None:
    """A loop that rebuilds each resample item by item, with other draws, gives the same quantiles."""
    clusters, values = clusters_and_values(60, seed=0)
    got = clustered_bootstrap(values, clusters, num_resamples=4000, proportion=False)
    draw = np.random.default_rng(99)
    means = []
    for _ in range(4000):
        picked = draw.choice(60, 60)
        means.append(np.concatenate([values[clusters == c] for c in picked]).mean())
    low, high = np.quantile(means, [0.025, 0.975])
    width = high - low
    assert got.value == pytest.approx(values.mean())
    assert got.low == pytest.approx(low, abs=0.04 * width)
    assert got.high == pytest.approx(high, abs=0.04 * width)


def test_the_bootstrap_of_two_clusters_by_hand() -> None:
    """Clusters {1, 1, 1} and {0}: resamples are AA (1), AB or BA (3/4), BB (0), with 1/4, 1/2, 1/4."""
    got = clustered_bootstrap(
        np.array([1, 1, 1, 0]), np.array(["a", "a", "a", "b"]), confidence=0.4
    )
    assert (got.value, got.low, got.high) == (0.75, 0.75, 0.75)
    wide = clustered_bootstrap(np.array([1, 1, 1, 0]), np.array(["a", "a", "a", "b"]))
    assert (wide.low, wide.high) == (0.0, 1.0)


def test_the_bootstrap_agrees_with_the_cluster_standard_error() -> None:
    clusters, values = clusters_and_values(400, seed=1)
    got = clustered_bootstrap(values, clusters, proportion=False)
    error = cluster_standard_error(values, clusters)
    assert (got.high - got.low) / 2 == pytest.approx(1.96 * error, rel=0.06)


def test_clustering_widens_the_interval_of_items_that_go_together() -> None:
    clusters, values = clusters_and_values(300, seed=2)
    together, apart = clustered_bootstrap(values, clusters), clustered_bootstrap(values)
    assert together.high - together.low > 1.25 * (apart.high - apart.low)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """300 draws with true mean 0: 95 % coverage has a standard error of 1.3 points; 3 of them are 4."""
    covered = 0
    for seed in range(300):
        clusters, values = clusters_and_values(80, seed=1000 + seed)
        got = clustered_bootstrap(values, clusters, num_resamples=400)
        covered += got.low <= 0 <= got.high
    assert 0.90 <= covered / 300 <= 0.99


def test_the_same_seed_gives_the_same_interval_and_the_labels_do_not_matter() -> None:
    clusters, values = clusters_and_values(50, seed=3)
    first = clustered_bootstrap(values, clusters, seed=5)
    names = np.array([f"prompt {c:03d}" for c in clusters])
    assert clustered_bootstrap(values, names, seed=5) == first
    assert clustered_bootstrap(values, clusters, seed=6) != first


def test_blocks_of_resamples_do_not_change_the_result() -> None:
    """Nine million draws make three blocks; one block of them all gives the same interval."""
    values = np.random.default_rng(0).normal(size=3000)
    first = clustered_bootstrap(values, num_resamples=3000)
    draw = np.random.default_rng(0)
    means = values[draw.integers(0, 3000, (3000, 3000))].mean(1)
    assert (first.low, first.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])))


def test_one_cluster_has_a_value_and_no_interval() -> None:
    got = clustered_bootstrap(np.array([1.0, 0.0]), np.array([7, 7]))
    assert got.value == 0.5
    assert math.isnan(got.low)
    assert math.isnan(clustered_bootstrap(np.zeros(0)).value)


# Pairs.


def test_the_paired_difference_is_narrower_than_two_intervals() -> None:
    draw = np.random.default_rng(0)
    first = draw.random(600) < 0.7
    second = np.where(draw.random(600) < 0.05, ~first, first)
    got = paired_bootstrap(first, second)
    assert got.value == pytest.approx(first.mean() - second.mean())
    single = clustered_bootstrap(first)
    assert got.high - got.low < 0.6 * (single.high - single.low)


def test_a_model_does_not_differ_from_itself() -> None:
    correct = np.random.default_rng(0).random(50) < 0.5
    got = paired_bootstrap(correct, correct, np.repeat(np.arange(25), 2))
    assert (got.value, got.low, got.high) == (0.0, 0.0, 0.0)
    assert mcnemar(correct, correct).p_value == 1.0


def test_the_paired_bootstrap_swaps_sign_with_its_arguments() -> None:
    draw = np.random.default_rng(1)
    first, second = draw.random((2, 90)) < 0.6
    there, back = paired_bootstrap(first, second), paired_bootstrap(second, first)
    assert (there.value, there.low, there.high) == pytest.approx(
        (-back.value, -back.high, -back.low)
    )


@pytest.mark.parametrize(("first_only", "second_only"), [(0, 0), (5, 5), (1, 9), (9, 1), (40, 61)])
def test_mcnemar_equals_the_exact_binomial_test(first_only: int, second_only: int) -> None:
    first = np.array([True] * first_only + [False] * second_only + [True] * 3 + [False] * 2)
    second = np.array([False] * first_only + [True] * second_only + [True] * 3 + [False] * 2)
    got = mcnemar(first, second)
    assert (got.num_first_only, got.num_second_only) == (first_only, second_only)
    discordant = first_only + second_only
    expected = stats.binomtest(first_only, discordant).pvalue if discordant else 1.0
    assert got.p_value == pytest.approx(expected, rel=1e-10)


def test_mcnemar_by_hand() -> None:
    """One against five: 2 * (C(6,0) + C(6,1)) / 2^6 = 14/64 = 0.21875."""
    first = np.array([True] + [False] * 5)
    assert mcnemar(first, ~first).p_value == pytest.approx(0.21875)


# The cluster standard error.


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


def test_without_clusters_it_is_the_usual_standard_error() -> None:
    values = np.random.default_rng(5).normal(size=40)
    expected = values.std() / math.sqrt(40)
    assert cluster_standard_error(values) == pytest.approx(expected)
    assert cluster_standard_error(values, np.arange(40)) == pytest.approx(expected)
    assert math.isnan(cluster_standard_error(np.zeros(0)))


# Holm.


def test_holm_by_hand() -> None:
    """Sorted 0.01, 0.03, 0.04 times 3, 2, 1: 0.03, 0.06, 0.04; never below the one before: 0.06."""
    got = holm(np.array([0.04, 0.01, 0.03]))
    assert got.tolist() == pytest.approx([0.06, 0.03, 0.06])


def test_holm_rejects_what_the_step_down_procedure_rejects() -> None:
    draw = np.random.default_rng(6)
    for _ in range(50):
        p = draw.random(8) ** 4
        rejected = np.zeros(8, bool)
        for step, which in enumerate(np.argsort(p)):
            if p[which] > 0.05 / (8 - step):
                break
            rejected[which] = True
        assert ((holm(p) <= 0.05) == rejected).all()


def test_holm_never_exceeds_one_and_takes_nothing() -> None:
    assert holm(np.array([0.9, 0.8])).tolist() == [1.0, 1.0]
    assert holm(np.zeros(0)).shape == (0,)
