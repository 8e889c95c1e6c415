"""Spectra and distances of hidden states, by hand and against loops."""

import math

import numpy as np
import pytest

from hafrm.diagnostics.diagnosis import describe_states, linear_cka, mean_cosine
from hafrm.errors import NumericsError
from hafrm.statistics import spectrum

CROSS = np.array([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
"""Equal variance along two directions."""


def random_states(num: int = 50, hidden: int = 7, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(1.0, 2.0, (num, hidden)).astype(np.float32)


@pytest.mark.parametrize(
    ("states", "rank", "top"),
    [(5 + 3 * CROSS, 2.0, 0.5), (CROSS * [math.sqrt(3), 1], 4 / 3**0.75, 0.75)],
)
def test_the_rank_is_the_exponential_of_the_entropy_wherever_the_states_lie(states, rank, top):
    """Variances 3 and 1: exp(-(3/4 ln 3/4 + 1/4 ln 1/4)) = 4 / 3^(3/4) = 1.7548."""
    got = describe_states("m", states)
    assert (got.effective_rank, got.top_fraction) == pytest.approx((rank, top))


def test_the_spectrum_is_that_of_the_covariance() -> None:
    states = random_states()
    values = np.linalg.eigvalsh(np.cov(states.astype(np.float64), rowvar=False))[::-1]
    np.testing.assert_allclose(spectrum(states), values / values.sum(), atol=1e-12)


def test_collapsed_states_have_rank_one_and_equal_ones_none() -> None:
    line = np.outer(np.arange(5.0), [1, 2, 3])
    assert describe_states("m", line).effective_rank == pytest.approx(1.0)
    same = np.full((5, 3), 0.1, np.float32)
    assert math.isnan(describe_states("m", same).effective_rank)
    assert math.isnan(describe_states("m", same).top_fraction)


def test_the_mean_cosine_equals_that_over_all_pairs() -> None:
    states = random_states(9)
    unit = states / np.linalg.norm(states, axis=1, keepdims=True)
    pairs = [unit[i] @ unit[j] for i in range(9) for j in range(9) if i != j]
    assert mean_cosine(states) == pytest.approx(np.mean(pairs), abs=1e-6)
    assert math.isnan(mean_cosine(states[:1]))


def test_cka_by_hand() -> None:
    """X = (1,0), (-1,0), (0,1), (0,-1) and Y its first column: |Y'X|^2 = 4, |X'X| = sqrt 8, |Y'Y| = 2."""
    assert linear_cka(CROSS, CROSS[:, :1]) == pytest.approx(4 / (math.sqrt(8) * 2))


def test_cka_is_blind_to_rotation_scale_and_place_and_not_to_more() -> None:
    states = random_states().astype(np.float64)
    rotation, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(7, 7)))
    assert linear_cka(states, 3 * states @ rotation + 4) == pytest.approx(1.0)
    assert linear_cka(states, random_states(seed=5)) < 0.5
    assert math.isnan(linear_cka(states, np.ones((50, 3))))
    assert describe_states("m", states, states).cka_to_base == pytest.approx(1.0)
    assert math.isnan(describe_states("m", states).cka_to_base)


def test_states_that_are_not_finite_are_refused() -> None:
    broken = random_states()
    broken[0, 0] = np.nan
    with pytest.raises(NumericsError, match="not finite"):
        describe_states("m", broken)
