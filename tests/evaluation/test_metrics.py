"""Metrics against golden values derived by hand and slow loops."""

import math
from dataclasses import replace

import numpy as np
import pytest

from hafrm.evaluation.comparisons import Comparisons
from hafrm.evaluation.metrics import calibration, length_bias, pairwise_accuracy, pairwise_metrics
from hafrm.preferences import Comparison, Group, Message


def scored(num: int = 200, *, ties: bool = True) -> tuple[Comparisons, np.ndarray]:
    """Random margins that like the chosen response and length a little; two comparisons per prompt."""
    draw = np.random.default_rng(0)
    lengths, noise = draw.integers(3, 60, (2, num)), draw.normal(size=(2, num))
    tied = (draw.random(num) < 0.1) & ties
    groups = []
    for i in range(0, num, 2):
        texts = tuple("x" * n for n in lengths[:, i : i + 2].T.ravel())
        pairs = (Comparison(0, 1, tie=bool(tied[i])), Comparison(2, 3, tie=bool(tied[i + 1])))
        groups.append(Group(f"g{i}", (Message("user", f"p{i}"),), texts, pairs, source="s"))
    return Comparisons.of(groups), 0.5 + noise[0] - noise[1] + 0.02 * (lengths[0] - lengths[1])


def test_equal_scores_are_counted_and_are_not_correct() -> None:
    """Margins 2, 0, -1, 0.5: two of four right, one equal."""
    got = pairwise_accuracy(np.array([2.0, 0.0, -1.0, 0.5]))
    assert (got.value, got.num, got.num_correct, got.num_equal) == (0.5, 4, 2, 1)
    assert pairwise_accuracy(np.zeros(10)).value == 0.0


def slow_ece(margins: np.ndarray, num_bins: int) -> float:
    """Points one by one: both sides of each comparison, sorted, dealt into bins of equal mass."""
    points = []
    for margin in margins:
        p = 1 / (1 + math.exp(-margin))
        points += [(p, 1.0), (1 - p, 0.0)]
    points.sort()
    total, start = 0.0, 0
    for b in range(num_bins):
        size = len(points) // num_bins + (b < len(points) % num_bins)
        part = points[start : start + size]
        start += size
        if part:
            confidence = sum(p for p, _ in part) / len(part)
            accuracy = sum(label for _, label in part) / len(part)
            total += len(part) / len(points) * abs(accuracy - confidence)
    return total


@pytest.mark.parametrize("num", [3, 7, 100, 1001])
def test_the_calibration_error_equals_a_slow_loop(num: int) -> None:
    margins = np.random.default_rng(num).normal(0.4, 1.5, num)
    assert calibration(margins).ece == pytest.approx(slow_ece(margins, 15))


def test_calibration_by_hand() -> None:
    """Margins ln 3 three times and -ln 3 once: p = 3/4 is right three times of four, 1/4 once.

    Two bins: the upper holds the four points of confidence 3/4 (3 right, 1 wrong), the lower mirrors
    it: ECE 0. Log loss (3 ln(4/3) + ln 4) / 4.
    """
    got = calibration(math.log(3) * np.array([1.0, 1.0, -1.0, 1.0]), num_bins=2)
    assert got.log_loss == pytest.approx((3 * math.log(4 / 3) + math.log(4)) / 4)
    assert got.ece == pytest.approx(0.0, abs=1e-12)
    assert [b.num for b in got.bins] == [4, 4]
    assert [b.confidence for b in got.bins] == pytest.approx([0.25, 0.75])


def test_the_calibration_of_a_sure_scorer_a_coin_and_huge_margins() -> None:
    """Sure of all (margin 40), right in 3 of 4: |3/4 - 1| = 1/4 in the upper bin and its mirror. A coin's
    points share p = 1/2 and half of them are right, however they are sorted into bins."""
    sure = calibration(np.array([40.0, 40.0, 40.0, -40.0]), num_bins=2)
    assert sure.ece == pytest.approx(0.25)
    coin = calibration(np.zeros(40))
    assert coin.log_loss == pytest.approx(math.log(2))
    assert coin.ece == pytest.approx(0.0, abs=1e-12)
    huge = calibration(np.array([1e4, -1e4]))
    assert huge.log_loss == pytest.approx(5000.0)


def test_length_slices_by_hand() -> None:
    """Chosen against rejected: 10/21 (much shorter), 10/20 (shorter: exactly 2 is not beyond 2), 10/12
    (shorter), 10/11 and 11/10 (about equal), 12/10 (longer), 21/10 (much longer)."""
    chosen = np.array([10, 10, 10, 10, 11, 12, 21])
    rejected = np.array([21, 20, 12, 11, 10, 10, 10])
    margins = np.array([1.0, 1.0, -1.0, 1.0, 1.0, -1.0, 1.0])
    slices = length_bias(margins, chosen, rejected).slices
    assert {name: (part.num, part.num_correct) for name, part in slices.items()} == {
        "much shorter": (1, 1),
        "shorter": (2, 1),
        "about equal": (2, 2),
        "longer": (1, 0),
        "much longer": (1, 1),
    }


def test_metrics_equal_a_loop_over_the_decided_comparisons() -> None:
    comparisons, scores = scored()
    got = pairwise_metrics(comparisons, scores)
    right, margins = 0, []
    for margin, pair in zip(scores, comparisons.pairs, strict=True):
        margins += [] if pair.tie else [margin]
        right += bool(not pair.tie and margin > 0)
    assert (got.accuracy.num_correct, got.accuracy.num) == (right, len(margins))
    assert got.mean_margin == pytest.approx(sum(margins) / len(margins))
    assert got.num_ties == len(scores) - len(margins) > 0
    assert sum(part.num for part in got.length.slices.values()) == len(margins)


def test_ties_change_nothing_but_their_count() -> None:
    comparisons, margins = scored(ties=False)
    tie = Group("t", (Message("user", "t"),), ("a", "bcd"), (Comparison(0, 1, tie=True),))
    tied = Comparisons.of([*comparisons.groups, tie])
    got = pairwise_metrics(tied, np.append(margins, 100.0))
    assert got == replace(pairwise_metrics(comparisons, margins), num_ties=1)


def test_data_of_ties_only_gives_no_numbers_and_no_error() -> None:
    tie = Group("t", (Message("user", "t"),), ("a", "bcd"), (Comparison(0, 1, tie=True),))
    got = pairwise_metrics(Comparisons.of([tie]), np.ones(1))
    assert got.accuracy.num == 0
    assert math.isnan(got.calibration.ece) and math.isnan(got.accuracy.value)
