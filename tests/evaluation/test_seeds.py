"""Seeds as a factor: by hand, against theory, and by simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from hafrm.statistics import seeded_difference, seeded_mean


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
    narrow = seeded_mean(np.array([[True, False], [True, True]]), confidence=0.2)
    half = stats.t.ppf(0.6, 2) * math.sqrt(1 / 8)
    assert (narrow.low, narrow.high) == pytest.approx((0.75 - half, 0.75 + half))


def test_seeds_that_differ_widen_the_interval_however_many_prompts_there_are() -> None:
    many = drawn(0, num_items=20_000, seed_sd=0.05)
    got = seeded_mean(many)
    of_seeds = stats.t.ppf(0.975, 3) * many.mean(1).std(ddof=1) / 2
    assert (got.high - got.low) / 2 == pytest.approx(of_seeds, rel=0.1)
    alike = drawn(0, num_items=20_000, seed_sd=0.0)
    assert seeded_mean(alike).high - seeded_mean(alike).low < 0.3 * (got.high - got.low)


def test_identical_seeds_leave_the_variation_over_prompts() -> None:
    """Then it is the usual interval of a mean, with Student's t over the prompts."""
    row = np.random.default_rng(1).random(50) < 0.6
    got = seeded_mean(np.tile(row, (3, 1)))
    expected = stats.t.interval(0.95, 49, row.mean(), stats.sem(row))
    assert (got.low, got.high) == pytest.approx(expected)


def test_prompts_with_several_comparisons_count_once() -> None:
    row = np.repeat(np.random.default_rng(2).random(30) < 0.6, 4)
    clusters = np.repeat(np.arange(30), 4)
    got = seeded_mean(np.tile(row, (2, 1)), clusters)
    expected = stats.t.interval(0.95, 29, row.mean(), stats.sem(row[::4]))
    assert (got.low, got.high) == pytest.approx(expected)


def test_the_interval_covers_another_seed_on_other_prompts_as_often_as_it_says() -> None:
    """200 runs of 4 seeds: at least 0.95 less three standard errors; on the wide side by construction."""
    covered = 0
    for seed in range(200):
        got = seeded_mean(drawn(seed, num_items=300))
        covered += got.low <= 0.7 <= got.high
    assert covered / 200 >= 0.905


def test_ignoring_seeds_would_cover_far_less() -> None:
    """The interval over prompts alone, of one seed, covers the method's 0.7 in little over half."""
    covered = 0
    for seed in range(200):
        row = drawn(seed, num_seeds=1, num_items=3000)[0]
        covered += abs(row.mean() - 0.7) <= 1.96 * row.std() / math.sqrt(3000)
    assert covered / 200 < 0.6


def test_no_difference_is_found_as_rarely_as_it_says() -> None:
    """Two sides of the same skill: p below 0.05 in at most 5 % of 300 pairs, and 3 standard errors."""
    found = 0
    for seed in range(300):
        first, second = drawn(2 * seed), drawn(2 * seed + 1)
        found += seeded_difference(first, second).p_value < 0.05
    assert found / 300 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 300)


def test_a_difference_swaps_sign_with_its_arguments_and_is_that_of_the_means() -> None:
    first, second = drawn(3), drawn(4, num_seeds=3)
    there, back = seeded_difference(first, second), seeded_difference(second, first)
    assert there.estimate.value == pytest.approx(first.mean() - second.mean())
    assert there.estimate.low == pytest.approx(-back.estimate.high)
    assert there.p_value == pytest.approx(back.p_value)
    assert (there.p_value < 0.05) == (not there.estimate.low <= 0 <= there.estimate.high)


def test_a_large_difference_is_found() -> None:
    draw = np.random.default_rng(5)
    got = seeded_difference(draw.random((3, 400)) < 0.8, draw.random((3, 400)) < 0.6)
    assert got.p_value < 0.001


def test_equal_sides_have_no_difference_and_p_one() -> None:
    same = np.tile(np.array([True, False, True]), (2, 1))
    got = seeded_difference(same, same)
    assert (got.estimate.value, got.estimate.low, got.estimate.high, got.p_value) == (0, 0, 0, 1)


def test_one_seed_says_nothing_about_another() -> None:
    with pytest.raises(ValueError, match="at least two seeds"):
        seeded_mean(drawn(0, num_seeds=1))
    with pytest.raises(ValueError, match="at least two seeds"):
        seeded_difference(drawn(0), drawn(0, num_seeds=1))
