"""The measure that selects a step, and reward hacking."""

import numpy as np
import pytest

from hafrm.rlhf.rlhf_run import reward_hacking, select_measure


def test_the_best_step_is_selected_by_gold_then_the_independent_reward_then_the_penalised_one():
    """(1, 3) - 0.5 * (2, 4) = (0, 1)."""
    rewards, kls = np.array([1.0, 3.0], np.float32), np.array([2.0, 4.0], np.float32)
    other = np.array([7.0, 8.0], np.float32)
    for independent, gold, name, values in (
        (other, other + 1, "gold", [8, 9]),
        (other, None, "independent", [7, 8]),
        (None, None, "penalised", [0, 1]),
    ):
        others = {"independent": independent, "gold": gold}
        measures = {"reward": rewards} | {n: v for n, v in others.items() if v is not None}
        selected_by, scores = select_measure(measures, kls, 0.5)
        assert (selected_by, scores.tolist()) == (name, values)


def test_a_negative_estimate_of_the_kl_earns_a_step_nothing():
    rewards = {"reward": np.array([1.0, 3.0], np.float32)}
    _, scores = select_measure(rewards, np.array([-5.0, 4.0], np.float32), 0.5)
    assert scores.tolist() == [1.0, 3.0]


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
        (
            [0.0, 0.2, 0.5, 1.0],
            [[3.0], [3.0], [3.0], [0.0]],
            False,
        ),  # one prompt: no error to go by
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
