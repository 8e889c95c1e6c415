"""Held-out measures: which one keeps a step, what length earns, and how several rewards become one."""

import numpy as np
import pytest

from hafrm.rlhf.held_out import HeldOut, length_matched, length_slope
from hafrm.rlhf.rewards import Rewards, Scale, combine
from hafrm.rlhf.rlhf_recipe import RewardSection
from hafrm.scoring.reward_model import Scorer


def held_out(**measures) -> HeldOut:
    two = np.array([1.0, 3.0], np.float32)
    values = {
        "rollouts": [],
        "rewards": two,
        "lowest": two - 1,
        "kls": np.array([2.0, 4.0], np.float32),
        "lengths": np.array([3, 5]),
        "ended": np.array([True, False]),
        "judged": None,
        "gold": None,
    }
    return HeldOut(**values | measures)


def test_the_best_step_is_kept_by_gold_then_judge_then_the_penalised_minimum():
    """(0, 2) - 0.5 * (2, 4) = (-1, 0)."""
    other = np.array([7.0, 8.0], np.float32)
    known = held_out(judged=other, gold=other + 1)
    assert (known.selected_by(), known.selection_scores(0.5).tolist()) == ("gold", [8, 9])
    judged = held_out(judged=other)
    assert (judged.selected_by(), judged.selection_scores(0.5).tolist()) == ("judge", [7, 8])
    alone = held_out()
    assert (alone.selected_by(), alone.selection_scores(0.5).tolist()) == ("penalised", [-1, 0])


def test_estimates_are_means_with_intervals_of_what_is_known():
    estimates = held_out(gold=np.array([1.0, 2.0], np.float32)).estimates()
    assert estimates.keys() == {"reward", "gold"}
    assert (estimates["reward"].value, estimates["gold"].value) == (2.0, 1.5)
    assert not estimates["reward"].proportion


def test_the_slope_of_reward_on_length_is_least_squares():
    """Lengths 1, 2, 3 and rewards 0, 1, 5: slope (1 * 5 + (-1) * 0 ...) = 5 / 2."""
    rewards = np.array([0.0, 1.0, 5.0], np.float32)
    assert length_slope(rewards, np.array([1, 2, 3])) == pytest.approx(2.5)
    assert length_slope(rewards, np.array([4, 4, 4])) == 0.0


def test_what_longer_responses_earn_by_their_length_is_taken_off():
    rewards = np.array([3.0, 5.0], np.float32)
    matched = length_matched(rewards, np.array([10, 14]), slope=0.5, length=10.0)
    assert matched.tolist() == [3.0, 3.0]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [("mean", [2.0, 0.0]), ("min", [1.0, -2.0]), ("lower_bound", [1.5, -1.0])],
)
def test_rewards_of_several_models_are_joined_by_the_rule(rule, expected):
    """Columns (1, 3) and (2, -2): means 2 and 0, population deviations 1 and 2, spread 0.5."""
    rewards = np.array([[1.0, 2.0], [3.0, -2.0]], np.float32)
    assert combine(rewards, rule, 0.5).tolist() == expected


class Fixed(Scorer):
    """A scorer whose rewards are the lengths of the responses in characters, times a factor."""

    def __init__(self, factor: float, offset: float) -> None:
        self.factor, self.offset = factor, offset
        self.encoder = self
        self.texts: list[str] = []

    def encode(self, groups):
        self.texts = [text for group in groups for text in group.responses]

        class Report:
            prompts_cut = responses_cut = dropped = 0

        return groups, Report()

    def score_encoded(self, encoded, on_progress=None):
        values = [self.factor * len(t) + self.offset for g in encoded for t in g.responses]
        return np.array(values, np.float32)


def test_several_models_are_put_on_one_scale_and_weighed_and_one_is_left_alone():
    """Lengths 1 and 3: mean 2, deviation 1, whatever factor and offset a model has."""
    section = RewardSection(models=("a", "b"), weights=(1.0, 2.0), rule="min")
    rewards = Rewards([Fixed(1.0, 0.0), Fixed(10.0, 500.0)], section)
    rewards.fit_scales([()], [["a", "aaa"]])
    assert rewards.scales == [Scale(2.0, 1.0), Scale(520.0, 10.0)]
    assert rewards.by_model([()], [["a", "aaa"]]).tolist() == [[-1, 1], [-2, 2]]
    alone = Rewards([Fixed(10.0, 500.0)], RewardSection(models=("a",)))
    alone.fit_scales([()], [["a", "aaa"]])
    assert alone.by_model([()], [["a", "aaa"]]).tolist() == [[510, 530]]


def test_a_response_written_twice_is_scored_once_and_counted_twice():
    scorer = Fixed(1.0, 0.0)
    rewards = Rewards([scorer], RewardSection(models=("a",)))
    assert rewards.by_model([(), ()], [["aa", "b", "aa"], ["ccc"]]).tolist() == [[2, 1, 2, 3]]
    assert scorer.texts == ["aa", "b", "ccc"]
