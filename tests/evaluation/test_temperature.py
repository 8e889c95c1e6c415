"""The fitted temperature by hand and against a grid."""

import math

import numpy as np
import pytest

from hafrm.evaluation.metrics import fit_temperature, temperature


def test_margins_of_one_size_get_the_temperature_that_gives_their_accuracy() -> None:
    """Three of four right with |margin| 2: the loss is least where sigmoid(2 / T) = 3/4: 2 / T = ln 3."""
    assert fit_temperature(np.array([2.0, 2.0, -2.0, 2.0])) == pytest.approx(2 / math.log(3))


@pytest.mark.parametrize(
    ("margins", "expected"),
    [([1.0, -1.0], math.inf), ([1.0, -3.0, 1.0], math.inf), ([1.0, 2.0, 0.0], math.nan)],
)
def test_chance_has_an_infinite_temperature_and_perfection_none(margins, expected) -> None:
    assert fit_temperature(np.array(margins)) == pytest.approx(expected, nan_ok=True)
    assert math.isnan(fit_temperature(np.zeros(3)))
    assert math.isnan(fit_temperature(np.empty(0)))


def test_it_is_fitted_on_half_of_the_prompts_and_tested_on_the_other() -> None:
    """Ten prompts of four comparisons, three right and one wrong of |margin| 2. Whatever half is fitted, T
    is the golden value above: log-loss goes from (3 ln(1+e^-2) + ln(1+e^2)) / 4 to the entropy of
    (3/4, 1/4). ECE goes from |sigmoid(2) - 3/4| to 0, but for the bin in the middle, which holds one
    point of each side, of 40, and has no gap."""
    margins = np.array([2.0, 2.0, 2.0, -2.0] * 10)
    prompts = np.repeat([f"p{i}" for i in range(10)], 4)
    got = temperature(margins, prompts)
    assert got.note == ""
    assert got.value == pytest.approx(2 / math.log(3))
    before = (3 * math.log1p(math.exp(-2)) + math.log1p(math.exp(2))) / 4
    after = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert got.log_loss == pytest.approx((before, after))
    assert got.ece == pytest.approx((38 / 40 * (1 / (1 + math.exp(-2)) - 0.75), 0.0), abs=1e-9)


def test_the_tested_half_is_not_fitted_on() -> None:
    """All margins of the tested half are -5, those of the fitted half 5 and -1: ln(1 + e^5) = 5.0067."""
    fitted = np.random.default_rng(0).permutation(8) < 4
    margins = np.where(fitted, 5.0, -5.0)
    margins[np.flatnonzero(fitted)[0]] = -1.0
    got = temperature(margins, np.arange(8))
    assert got.log_loss[0] == pytest.approx(5.0067, abs=1e-4)
    assert got.value == pytest.approx(fit_temperature(np.array([-1.0, 5.0, 5.0, 5.0])))


@pytest.mark.parametrize(
    ("margins", "prompts", "note", "loss"),
    [
        ([1.0, -0.5], ["p", "p"], "cannot be fitted", math.nan),  # a single prompt
        ([-1.0] * 20, range(20), "no better than chance", math.log(2)),
    ],
)
def test_where_no_temperature_helps_the_note_says_why(margins, prompts, note, loss) -> None:
    got = temperature(np.array(margins), np.array(prompts))
    assert (got.note, math.isfinite(got.value)) == (note, False)
    assert got.log_loss[1] == pytest.approx(loss, nan_ok=True)
