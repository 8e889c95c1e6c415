"""The KL coefficient and the running scale of rewards, by hand and against one big batch."""

import json
import math
from dataclasses import asdict

import pytest
import torch

from hafrm.rlhf.ppo_terms import KlControl, Moments, ScoreRules


def test_a_fixed_coefficient_stays_whatever_is_measured():
    control = KlControl(0.1)
    assert control.after(1000.0, 64) == control


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (6.0, 0.2),  # on target
        (6.6, 0.2 * (1 + 0.1 * 64 / 640)),  # 10 % above: e = 0.1
        (60.0, 0.2 * (1 + 0.2 * 64 / 640)),  # far above: e is held at 0.2
        (0.0, 0.2 * (1 - 0.2 * 64 / 640)),  # far below
    ],
)
def test_an_adaptive_coefficient_follows_the_target_by_a_fifth_of_the_horizon_at_most(kl, expected):
    """arXiv 1909.08593, Sec. 2.2, with TRL's K = responses / horizon = 64 / 640."""
    control = KlControl(0.2, target=6.0, horizon=640)
    assert control.after(kl, 64).coefficient == pytest.approx(expected)


def test_moments_of_batches_are_the_moments_of_all_rewards_at_once():
    torch.manual_seed(0)
    batches = [torch.randn(n) * 3 + 7 for n in (1, 5, 64, 2)]
    moments = Moments()
    for batch in batches:
        moments = moments.including(batch)
    everything = torch.cat(batches).double()
    assert moments.count == 72
    assert moments.mean == pytest.approx(float(everything.mean()), rel=1e-9)
    assert moments.std == pytest.approx(float(everything.std()), rel=1e-9)


def test_moments_by_hand():
    """(2, 4) then (6): mean 3, deviations 2; then mean 4, squares 4 + 0 + 4 = 8, std 2."""
    first = Moments().including(torch.tensor([2.0, 4.0]))
    assert (first.mean, first.squares, first.std) == (3.0, 2.0, pytest.approx(math.sqrt(2)))
    second = first.including(torch.tensor([6.0]))
    assert (second.mean, second.squares, second.std) == (4.0, 8.0, 2.0)


def test_a_single_reward_and_equal_rewards_have_scale_1():
    assert Moments().including(torch.tensor([5.0])).std == 1.0
    assert Moments().including(torch.tensor([5.0, 5.0])).std == 1.0


def test_what_is_remembered_goes_through_json_to_the_bit():
    moments = Moments().including(torch.randn(33))
    assert Moments.from_dict(json.loads(json.dumps(moments.to_dict()))) == moments
    control = KlControl(0.2, 6.0).after(7.123, 64)
    assert KlControl(**json.loads(json.dumps(asdict(control)))) == control


def test_scores_are_centred_scaled_and_clipped_in_this_order():
    """mean 4, std 2: 10 -> 6 -> 3 -> 2.5."""
    moments = Moments(3.0, 4.0, 8.0)
    rewards = torch.tensor([10.0, 4.0, 3.0])
    assert ScoreRules().apply(rewards, moments).tolist() == [10, 4, 3]
    assert ScoreRules(center=True).apply(rewards, moments).tolist() == [6, 0, -1]
    assert ScoreRules(scale=True).apply(rewards, moments).tolist() == [5, 2, 1.5]
    full = ScoreRules(scale=True, center=True, clip=2.5)
    assert full.apply(rewards, moments).tolist() == [2.5, 0, -0.5]
