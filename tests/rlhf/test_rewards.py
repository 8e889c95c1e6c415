"""What responses are worth: text to rewards, the measure that selects a step, and reward hacking."""

import numpy as np
import pytest

from hafrm.preferences import Message
from hafrm.rlhf.rewards import HeldOut, reward_hacking, score_texts
from hafrm.scoring.reward_model import RewardModel
from support.tiny_rlhf import write_reward


def test_a_response_written_twice_is_scored_once_and_counted_twice(tmp_path, monkeypatch):
    model = RewardModel.from_pretrained(write_reward(tmp_path))
    run, texts = model.score_encoded, []
    monkeypatch.setattr(
        model, "score_encoded", lambda e: texts.extend(len(g.response_ids) for g in e) or run(e)
    )
    prompts = ["Say sun.", "Say sea."]
    asked = [(Message("user", prompt),) for prompt in prompts]
    rewards = score_texts(model, asked, [["sun", "sea", "sun"], ["moon"]])
    assert texts == [2, 1]
    expected = [*model.score(prompts[0], ["sun", "sea", "sun"]), model.score(prompts[1], "moon")]
    assert rewards.tolist() == pytest.approx(expected, abs=1e-6)


def test_the_best_step_is_selected_by_gold_then_the_independent_reward_then_the_penalised_one():
    """(1, 3) - 0.5 * (2, 4) = (0, 1)."""
    rewards, kls = np.array([1.0, 3.0], np.float32), np.array([2.0, 4.0], np.float32)
    other = np.array([7.0, 8.0], np.float32)
    for independent, gold, name, values in (
        (other, other + 1, "gold", [8, 9]),
        (other, None, "independent", [7, 8]),
        (None, None, "penalised", [0, 1]),
    ):
        selected_by, scores = HeldOut([], rewards, kls, independent, gold).selection(0.5)
        assert (selected_by, scores.tolist()) == (name, values)


START, END = [3.0, 1.0, 2.0, 5.0], [2.0, -0.2, 1.2, 4.0]
"""Paired changes (-1, -1.2, -0.8, -1): mean -1, standard error 0.163 / 2."""
NOISE = [0.0, 2.0, 1.0, 4.0]
"""Changes from START (-3, 1, -1, -1): mean -1, standard error 0.82."""


@pytest.mark.parametrize(
    ("rewards", "held_out", "is_hacking"),
    [
        ([0.0, 0.2, 0.5, 1.0], [START, START, START, END], True),
        ([0.0, 0.5, 1.0], [START, START, END], False),  # too early to say
        ([0.0, 0.2, 0.5, 1.0], [END, END, END, START], False),  # both rise
        ([1.0, 0.5, 0.2, 0.0], [START, START, START, END], False),  # both fall
        ([0.0, 0.2, 0.5, 1.0], [START, START, START, NOISE], False),
        ([0.0, 0.1, 0.2, 0.5, 1.0], [START, END, END, END, END], False),  # fell before the window
    ],
)
def test_a_reward_that_rises_while_the_other_measure_falls_is_hacking(
    rewards, held_out, is_hacking
):
    reason = reward_hacking(list(zip(rewards, held_out, strict=True)))
    assert (reason is not None) == is_hacking
    if reason is not None:
        assert "rose from 0.000 to 1.000" in reason
        assert "fell by 1.000" in reason
