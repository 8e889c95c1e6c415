"""Held-out measures: which one selects a step, what length earns, joined rewards, and when a run stops."""

import json
from dataclasses import asdict

import numpy as np
import pytest

from hafrm.results import from_plain
from hafrm.rlhf.rewards import HeldOut, Rewards, length_matched, length_slope
from hafrm.rlhf.rlhf_recipe import WatchdogSection
from hafrm.rlhf.watchdog import Watchdog
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
        "independent": None,
        "gold": None,
    }
    return HeldOut(**values | measures)


def test_the_best_step_is_selected_by_gold_then_the_independent_reward_then_the_minimum():
    """(0, 2) - 0.5 * (2, 4) = (-1, 0)."""
    other = np.array([7.0, 8.0], np.float32)
    for measured, name, values in (
        (held_out(independent=other, gold=other + 1), "gold", [8, 9]),
        (held_out(independent=other), "independent", [7, 8]),
        (held_out(), "penalised", [-1, 0]),
    ):
        selected_by, scores = measured.selection(0.5)
        assert (selected_by, scores.tolist()) == (name, values)


def test_the_slope_of_reward_on_length_is_least_squares():
    """Lengths 1, 2, 3 and rewards 0, 1, 5: slope (1 * 5 + (-1) * 0 ...) = 5 / 2."""
    rewards = np.array([0.0, 1.0, 5.0], np.float32)
    assert length_slope(rewards, np.array([1, 2, 3])) == pytest.approx(2.5)
    assert length_slope(rewards, np.array([4, 4, 4])) == 0.0


def test_what_longer_responses_earn_by_their_length_is_taken_off():
    rewards = np.array([3.0, 5.0], np.float32)
    matched = length_matched(rewards, np.array([10, 14]), slope=0.5, length=10.0)
    assert matched.tolist() == [3.0, 3.0]


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


def test_several_models_are_put_on_one_scale_and_one_is_left_alone():
    """Lengths 1 and 3: mean 2, deviation 1, whatever factor and offset a model has."""
    rewards = Rewards([Fixed(1.0, 0.0), Fixed(10.0, 500.0)])
    rewards.fit_scales([()], [["a", "aaa"]])
    assert rewards.scales == [(2.0, 1.0), (520.0, 10.0)]
    assert rewards.by_model([()], [["a", "aaa"]]).tolist() == [[-1, 1], [-1, 1]]
    alone = Rewards([Fixed(10.0, 500.0)])
    alone.fit_scales([()], [["a", "aaa"]])
    assert alone.by_model([()], [["a", "aaa"]]).tolist() == [[510, 530]]


@pytest.mark.parametrize(("rule", "expected"), [("mean", [2.0, 0.0]), ("min", [1.0, -2.0])])
def test_rewards_of_several_models_are_joined_by_the_rule(rule, expected):
    by_model = np.array([[1.0, 2.0], [3.0, -2.0]], np.float32)
    assert Rewards([], rule).combine(by_model).tolist() == expected


def test_a_response_written_twice_is_scored_once_and_counted_twice():
    scorer = Fixed(1.0, 0.0)
    rewards = Rewards([scorer])
    assert rewards.by_model([(), ()], [["aa", "b", "aa"], ["ccc"]]).tolist() == [[2, 1, 2, 3]]
    assert scorer.texts == ["aa", "b", "ccc"]


RULES = WatchdogSection(max_kl=10.0, min_entropy_fraction=0.2, patience=2, hacking_window=3)


def test_a_high_kl_stops_after_as_many_batches_in_a_row_as_patience_says():
    dog = Watchdog()
    assert dog.batch(RULES, reward=0.0, kl=10.5, entropy=2.0) is None
    assert dog.batch(RULES, reward=0.0, kl=9.0, entropy=2.0) is None
    assert dog.batch(RULES, reward=0.0, kl=10.5, entropy=2.0) is None
    assert "watch.max_kl 10" in dog.batch(RULES, reward=0.0, kl=11.0, entropy=2.0)


def test_an_entropy_under_its_fraction_of_the_first_one_stops():
    """0.2 of 2.0 is 0.4."""
    dog = Watchdog()
    for entropy in (2.0, 0.39, 0.41, 0.39):
        assert dog.batch(RULES, reward=0.0, kl=0.0, entropy=entropy) is None
    assert "under 0.400" in dog.batch(RULES, reward=0.0, kl=0.0, entropy=0.1)


def evaluations(training: list[float], held_out: list[list[float]]) -> list[str | None]:
    dog = Watchdog()
    reasons = [dog.evaluation(RULES, held_out[0], "gold reward", proxy=training[0])]
    for reward, values in zip(training[1:], held_out[1:], strict=True):
        dog.batch(RULES, reward=reward, kl=0.0, entropy=1.0)
        reasons.append(dog.evaluation(RULES, values, "gold reward", proxy=99.0))
    return reasons


def test_a_training_reward_that_rises_while_the_held_out_one_falls_is_hacking():
    """Paired changes (-1, -1.2, -0.8, -1): mean -1, standard error 0.163 / 2."""
    start, end = [3.0, 1.0, 2.0, 5.0], [2.0, -0.2, 1.2, 4.0]
    reasons = evaluations([0.0, 0.5, 1.0], [start, start, end])
    assert reasons[:2] == [None, None]
    assert "rose from 0.000 to 1.000 while the held-out gold reward fell by 1.000" in reasons[2]


def test_it_is_no_hacking_when_both_rise_when_both_fall_or_when_the_fall_is_noise():
    start, end = [3.0, 1.0, 2.0, 5.0], [2.0, -0.2, 1.2, 4.0]
    assert evaluations([0.0, 0.5, 1.0], [end, end, start]) == [None] * 3
    assert evaluations([1.0, 0.5, 0.0], [start, start, end]) == [None] * 3
    noise = [0.0, 2.0, 1.0, 4.0]  # changes (-3, 1, -1, -1): mean -1, standard error 0.82
    assert evaluations([0.0, 0.5, 1.0], [start, start, noise]) == [None] * 3


def test_only_the_window_counts():
    """The fall lies between the first evaluation and the second, outside a window of the last three."""
    start, end = [3.0, 1.0, 2.0, 5.0], [2.0, -0.2, 1.2, 4.0]
    reasons = evaluations([0.0, 0.1, 0.2, 0.3], [start, start, end, end])
    assert reasons[2] is not None
    assert evaluations([0.0, 0.1, 0.2, 0.3], [start, end, end, end])[3] is None


def test_the_watchdog_goes_through_json():
    dog = Watchdog()
    dog.evaluation(RULES, [1.0, 2.0], "gold reward", proxy=0.5)
    dog.batch(RULES, reward=1.0, kl=11.0, entropy=0.5)
    assert from_plain(Watchdog, json.loads(json.dumps(asdict(dog)))) == dog
