"""The interval that every printed share has, and how it is logged and printed."""

import pytest
from scipy import stats

from hafrm.statistics import in_words, wilson, with_bounds


@pytest.mark.parametrize(("correct", "num"), [(0, 7), (3, 7), (7, 7), (632, 1000)])
def test_wilsons_interval_equals_scipys(correct: int, num: int) -> None:
    expected = stats.binomtest(correct, num).proportion_ci(method="wilson")
    assert wilson(correct / num, num) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_nothing_seen_leaves_everything_possible_and_the_ends_are_exact() -> None:
    assert wilson(0.0, 0) == (0.0, 1.0)
    assert wilson(0.0, 5)[0] == 0.0
    assert wilson(1.0, 5)[1] == 1.0


def test_fewer_trials_than_items_widen_it_and_need_not_be_whole() -> None:
    few, many = wilson(0.6, 12.5), wilson(0.6, 50)
    assert few[0] < many[0] < 0.6 < many[1] < few[1]


def test_a_logged_share_brings_its_bounds_and_is_printed_with_them() -> None:
    """80 of 100: Wilson's bounds are 0.7112 and 0.8666."""
    values = {"loss": 0.51234, **with_bounds("accuracy", 0.8, 100), "margin": 2.0}
    assert list(values) == ["loss", "accuracy", "accuracy_low", "accuracy_high", "margin"]
    assert in_words(values) == "loss 0.5123  accuracy 0.8 [0.711, 0.867]  margin 2"


def test_a_value_that_is_called_low_for_itself_is_printed() -> None:
    assert in_words({"fever_low": 36.5}) == "fever_low 36.5"
