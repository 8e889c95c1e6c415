"""Every term of PPO against numbers worked out by hand in the docstring."""

import json
import math
from dataclasses import asdict

import pytest
import torch

from hafrm.rlhf import ppo_terms as terms
from hafrm.rlhf.rlhf_recipe import RewardSection

LENGTHS = torch.tensor([3, 1, 2])


def close(result: torch.Tensor, expected: list[float], tolerance: float = 1e-6) -> None:
    assert result.tolist() == pytest.approx(expected, abs=tolerance)


def test_rows_are_the_flat_tokens_of_each_response():
    flat = torch.tensor([1.0, 2, 3, 4, 5, 6])
    rows = terms.to_rows(flat, LENGTHS)
    assert rows.tolist() == [[1, 2, 3], [4, 0, 0], [5, 6, 0]]


def test_the_kl_penalty_is_paid_at_every_token_and_the_score_at_the_last():
    """beta = 0.5, log-ratios (0.2, -0.4, 0) | (1) | (0, 2), scores 3 | -1 | 0.5:
    -0.1, 0.2, 0 + 3 | -0.5 - 1 | 0, -1 + 0.5."""
    ratios = torch.tensor([0.2, -0.4, 0.0, 1.0, 0.0, 2.0])
    rewards = terms.token_rewards(torch.tensor([3.0, -1.0, 0.5]), ratios, LENGTHS, 0.5)
    close(rewards, [-0.1, 0.2, 3.0, -1.5, 0.0, -0.5])


def test_advantages_equal_the_double_sum_of_their_definition():
    """GAE, Eq. 16, rollouts out: A_t = sum_l (gamma lam)^l delta_{t+l}."""
    torch.manual_seed(0)
    lengths = torch.tensor([4, 7, 1])
    rewards, values = torch.randn(12), torch.randn(12)
    advantages, returns = terms.estimate_advantages(rewards, values, lengths, gamma=0.9, lam=0.7)
    expected = []
    for r, v in zip(rewards.split([4, 7, 1]), values.split([4, 7, 1]), strict=True):
        after = [*v.tolist()[1:], 0.0]
        deltas = [float(r[t]) + 0.9 * after[t] - float(v[t]) for t in range(len(r))]
        expected += [
            sum((0.9 * 0.7) ** (k - t) * deltas[k] for k in range(t, len(r))) for t in range(len(r))
        ]
    close(advantages, expected, 1e-5)
    close(returns, [a + float(v) for a, v in zip(expected, values, strict=True)], 1e-5)


def test_whitened_values_have_mean_0_and_the_unbiased_variance_1():
    """(1, 2, 3): mean 2, unbiased variance 1, so (-1, 0, 1)."""
    close(terms.whiten(torch.tensor([1.0, 2.0, 3.0])), [-1.0, 0.0, 1.0])
    close(terms.whiten(torch.tensor([5.0])), [0.0])


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss"),
    [
        (1.0, 2.0, -2.0),  # nothing has moved
        (1.5, 2.0, -2.4),  # a good token beyond 1.2 earns what 1.2 earns
        (0.5, 2.0, -1.0),  # a good token that became rarer is not clipped
        (0.5, -2.0, 1.6),  # a bad token under 0.8 costs what 0.8 costs
        (1.5, -2.0, 3.0),  # a bad token that became likelier is not clipped
    ],
)
def test_the_surrogate_is_clipped_where_it_would_reward_going_further(ratio, advantage, loss):
    """PPO, Eq. 7, with eps 0.2."""
    old = torch.tensor([-1.0])
    new = (old + math.log(ratio)).requires_grad_()
    result = terms.policy_losses(new, old, torch.tensor([advantage]), 0.2)
    close(result.detach(), [loss])
    result.sum().backward()
    clipped = (ratio > 1.2 and advantage > 0) or (ratio < 0.8 and advantage < 0)
    # d(-rho A)/d(log pi) = -rho A where it is not clipped
    close(new.grad, [0.0 if clipped else -ratio * advantage])


@pytest.mark.parametrize(
    ("value", "old", "target", "loss"),
    [
        (1.0, 1.0, 3.0, 2.0),  # (1 - 3)^2 / 2
        (2.0, 1.0, 3.0, 1.62),  # as if at 1.2: (1.2 - 3)^2 / 2, more than (2 - 3)^2 / 2
        (0.0, 1.0, 3.0, 4.5),  # moving away is charged in full: (0 - 3)^2 / 2 over (0.8 - 3)^2 / 2
        (1.1, 1.0, 1.1, 0.0),
    ],
)
def test_the_value_loss_takes_the_worse_of_value_and_clipped_value(value, old, target, loss):
    tensors = (torch.tensor([x]) for x in (value, old, target))
    close(terms.value_losses(*tensors, 0.2), [loss])


def test_clipped_tokens_are_counted():
    """Ratios 1, 1.5, 0.5, 1.1 with eps 0.2: two outside."""
    new = torch.tensor([1.0, 1.5, 0.5, 1.1]).log()
    assert float(terms.clipped_tokens(new, torch.zeros(4), 0.2)) == 2


@pytest.mark.parametrize(
    ("kl", "target", "expected"),
    [
        (6.0, 6.0, 0.2),  # on target
        (6.6, 6.0, 0.2 * (1 + 0.1 * 64 / 640)),  # 10 % above: e = 0.1
        (60.0, 6.0, 0.2 * (1 + 0.2 * 64 / 640)),  # far above: e is held at 0.2
        (0.0, 6.0, 0.2 * (1 - 0.2 * 64 / 640)),  # far below
        (1000.0, None, 0.2),  # fixed
    ],
)
def test_the_kl_coefficient_follows_its_target_by_a_fifth_of_the_horizon_at_most(
    kl, target, expected
):
    """arXiv 1909.08593, Sec. 2.2, with TRL's K = responses / horizon = 64 / 640."""
    coefficient = terms.next_kl_coefficient(0.2, kl, 64, target, 640)
    assert coefficient == pytest.approx(expected)


def test_moments_of_batches_are_the_moments_of_all_rewards_at_once():
    """By hand: (2, 4) then (6): mean 4, squares 4 + 0 + 4 = 8, std 2. A single reward has scale 1."""
    first = terms.Moments().including(torch.tensor([2.0, 4.0]))
    second = first.including(torch.tensor([6.0]))
    assert (second.mean, second.squares, second.std) == (4.0, 8.0, 2.0)
    assert terms.Moments().including(torch.tensor([5.0])).std == 1.0
    assert terms.Moments().including(torch.tensor([5.0, 5.0])).std == 1.0
    torch.manual_seed(0)
    batches = [torch.randn(n) * 3 + 7 for n in (1, 5, 64, 2)]
    moments = terms.Moments()
    for batch in batches:
        moments = moments.including(batch)
    everything = torch.cat(batches).double()
    assert moments.mean == pytest.approx(float(everything.mean()), rel=1e-9)
    assert moments.std == pytest.approx(float(everything.std()), rel=1e-9)
    assert terms.Moments(**json.loads(json.dumps(asdict(moments)))) == moments


@pytest.mark.parametrize(
    ("section", "scores"),
    [
        ({}, [10, 4, 3]),
        ({"center": True}, [6, 0, -1]),
        ({"scale": True}, [5, 2, 1.5]),
        ({"center": True, "scale": True, "clip": 2.5}, [2.5, 0, -0.5]),
        ({"clip": 3.5, "missing_eos_penalty": 0.75}, [3.5, 2.75, 3]),
    ],
)
def test_scores_are_centred_scaled_and_clipped_in_this_order_then_pay_for_a_missing_eos(
    section, scores
):
    """mean 4, std 2: 10 -> 6 -> 3 -> 2.5. The second response does not end: min(4, 3.5) - 0.75."""
    rewards, ended = torch.tensor([10.0, 4.0, 3.0]), torch.tensor([True, False, True])
    moments = terms.Moments(3.0, 4.0, 8.0)
    assert terms.scores_of(rewards, ended, moments, RewardSection(**section)).tolist() == scores
