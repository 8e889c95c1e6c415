"""The fused score: its factor by hand, and its sum."""

import numpy as np
import pytest

from hafrm.errors import CheckpointError
from hafrm.results import read_result, write_result
from hafrm.scoring.reward_model import FusedRule, fit_fused, fused_scores


def crossed(times: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Where only the reward differs it is right 3 times of 4, where only the other does 9 of 10."""
    reward = [1.0] * 3 + [-1.0] + [0.0] * 10
    implicit = [0.0] * 4 + [1.0] * 9 + [-1.0]
    return np.array(reward * times), np.array(implicit * times)


def test_the_factor_is_the_ratio_of_the_two_log_odds():
    """The sums do not meet: sigmoid(a) = 3/4 and sigmoid(b) = 9/10, so b / a = ln 9 / ln 3 = 2.

    A larger scale has a smaller factor; one that is right 1 time of 10 has b = -ln 9, which becomes 0.
    """
    reward, implicit = crossed()
    assert fit_fused(reward, implicit).factor == pytest.approx(2.0, rel=1e-5)
    reward, implicit = crossed(10)
    assert fit_fused(reward, 10 * implicit).factor == pytest.approx(0.2, rel=1e-5)
    assert fit_fused(100 * reward, implicit).factor == pytest.approx(200, rel=1e-5)
    assert fit_fused(reward, -implicit) == FusedRule(0.0, 140)


@pytest.mark.parametrize(
    ("reward", "implicit", "note"),
    [
        ([], [], "does not separate"),
        ([1.0, -1.0, 1.0], [0.0, 0.0, 0.0], "does not separate"),
        ([1.0, -1.0], [0.1, 3.0], "right about every comparison"),
        ([1.0, 1.0, -1.0], [2.0, 1.0, 3.0], "right about every comparison"),
        ([-1.0] * 3 + [1.0] + [0.0] * 4, [0.0] * 4 + [1.0] * 3 + [-1.0], "adds nothing"),
    ],
)
def test_where_nothing_can_be_estimated_the_reward_stands_alone(reward, implicit, note):
    """(1, 0.1) and (-1, 3) are both right by w = (1, 1): no finite coefficients are the likeliest."""
    rule = fit_fused(np.array(reward), np.array(implicit))
    assert rule.factor == 0.0
    assert note in rule.note


def test_a_fused_score_is_the_reward_and_the_factor_times_the_implicit_one_per_token():
    """1 + 0.2 * 6 / 3 and -1 - 0.2 * 2 / 4; without lengths it counts per token already."""
    rewards, implicit = np.array([1.0, -1.0]), np.array([6.0, -2.0])
    scores = fused_scores(rewards, implicit, FusedRule(0.2), np.array([3, 4]))
    assert scores.tolist() == pytest.approx([1.4, -1.1])
    assert fused_scores(rewards, implicit, FusedRule(0.2), None).tolist() == pytest.approx(
        [2.2, -1.4]
    )


def test_a_rule_is_read_as_it_was_written_and_a_damaged_one_refused(tmp_path):
    file, rule = tmp_path / "fused.json", FusedRule(0.3, 17, "why")
    write_result(file, rule)
    assert read_result(file, FusedRule) == rule
    for text in ("{", '{"factor": -1}', '{"factor": null}', '{"other": 1}', '{"factor": Infinity}'):
        file.write_text(text)
        with pytest.raises(CheckpointError, match=r"fused\.json"):
            read_result(file, FusedRule)
