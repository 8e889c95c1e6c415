"""The losses against golden values derived by hand, their limits and their gradients."""

import math
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from hafrm.training import losses
from hafrm.training.losses import PolicyLogps, reward_loss
from hafrm.training.methods import POLICY_LOSSES


def batch(
    chosen: float,
    rejected: float,
    reference: tuple[float, float] = (0.0, 0.0),
    counts: tuple[int, int] = (1, 1),
) -> PolicyLogps:
    """One comparison."""
    return PolicyLogps(*(torch.tensor([x]) for x in (chosen, rejected, *counts, *reference)))


def random_batch(num: int = 64, dtype: torch.dtype = torch.float64) -> PolicyLogps:
    draw = torch.Generator().manual_seed(3)

    def logps(counts: Tensor) -> Tensor:
        return -counts * (0.1 + 2 * torch.rand(num, generator=draw, dtype=dtype))

    counts = torch.randint(1, 40, (2, num), generator=draw)
    return PolicyLogps(
        logps(counts[0]), logps(counts[1]), counts[0], counts[1], logps(counts[0]), logps(counts[1])
    )


def softplus(x: float) -> float:
    """-log sigmoid(-x), for the arithmetic of the docstrings."""
    return math.log1p(math.exp(x))


def call(name: str, given: PolicyLogps) -> Tensor:
    loss = POLICY_LOSSES[name]
    return loss.function(given, **loss.options)


# The reward loss.


@pytest.mark.parametrize(
    ("gap", "options", "expected"),
    [
        (math.log(3), {}, -math.log(0.75)),  # sigmoid(ln 3) = 3/4
        (-math.log(3), {}, -math.log(0.25)),
        (0.0, {}, math.log(2)),
        (3.0, {"margin": 3.0}, math.log(2)),  # a gap of 3 with a margin of 3 is worth a gap of 0
        (3.0, {"margin": 1.0}, softplus(-2)),
        # gap 2, margin 0.5, eps 0.1: 0.9 * softplus(-(2 - 0.5)) + 0.1 * softplus(-(-2 - 0.5))
        (2.0, {"margin": 0.5, "label_smoothing": 0.1}, 0.9 * softplus(-1.5) + 0.1 * softplus(2.5)),
    ],
)
def test_reward_loss_is_the_likelihood_of_bradley_terry(gap, options, expected) -> None:
    if "margin" in options:
        options = {**options, "margin": torch.tensor([options["margin"]])}
    loss = reward_loss(torch.tensor([gap]), torch.zeros(1), **options)
    torch.testing.assert_close(loss, torch.tensor([expected]))


def test_centering_adds_the_squared_sum_of_rewards() -> None:
    """Rewards 2 and 1: softplus(-1) + 0.01 * (2 + 1)^2 = softplus(-1) + 0.09."""
    loss = reward_loss(torch.tensor([2.0]), torch.tensor([1.0]), centering=0.01)
    torch.testing.assert_close(loss, torch.tensor([softplus(-1) + 0.09]))


def test_reward_gradient_is_minus_the_probability_of_being_wrong() -> None:
    """d/dr_c of -log sigmoid(r_c - r_r) = -sigmoid(-(r_c - r_r)), and the opposite for r_r."""
    chosen = torch.tensor([0.3, -2.0, 40.0], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([0.1, 3.0, -40.0], dtype=torch.float64, requires_grad=True)
    reward_loss(chosen, rejected).sum().backward()
    wrong = torch.sigmoid(rejected - chosen).detach()
    torch.testing.assert_close(chosen.grad, -wrong)
    torch.testing.assert_close(rejected.grad, wrong)


# What a reward loss reads of the whole step.


def test_normbt_weighs_a_comparison_by_the_mean_distance_over_its_own() -> None:
    """Mean distance 2; distances 1, 2 and 4 get 2, 1 and 1/2, and no gradient."""
    distances = torch.tensor([1.0, 2.0, 4.0], requires_grad=True)
    got = losses.distance_weights(distances, torch.tensor(2.0))
    torch.testing.assert_close(got, torch.tensor([2.0, 1.0, 0.5]), atol=1e-5, rtol=0)
    assert not got.requires_grad


def test_normbt_takes_the_distance_out_of_the_gradient_of_the_reward_head() -> None:
    """d/dw of -log sigmoid(w . (h_c - h_r)) is error * (h_c - h_r); weighed, its norm is mu * error."""
    draw = torch.Generator().manual_seed(1)
    head = torch.randn(8, generator=draw, dtype=torch.float64, requires_grad=True)
    chosen, rejected = torch.randn(2, 5, 8, generator=draw, dtype=torch.float64)
    chosen = rejected + (chosen - rejected) * torch.tensor([[0.01], [0.1], [1.0], [10.0], [100.0]])
    distances = (chosen - rejected).norm(dim=1)
    weights = losses.distance_weights(distances, distances.mean())
    loss = weights * reward_loss(chosen @ head, rejected @ head)
    norms = torch.stack([torch.autograd.grad(x, head, retain_graph=True)[0].norm() for x in loss])
    errors = torch.sigmoid((rejected - chosen) @ head).detach()
    torch.testing.assert_close(norms, distances.mean() * errors, rtol=1e-3, atol=0)


def test_the_parts_of_the_sum_to_zero_penalty_average_to_it_and_so_do_their_gradients() -> None:
    """The released code of BSR: n * mean([chosen, rejected])^2, n the comparisons of the batch."""
    draw = torch.Generator().manual_seed(2)
    chosen, rejected = torch.randn(2, 6, generator=draw, dtype=torch.float64).requires_grad_()
    mean = torch.cat([chosen, rejected]).mean()
    whole = 6 * mean**2
    parts = losses.sum_to_zero_loss(chosen, rejected, mean, 6)
    torch.testing.assert_close(parts.mean(), whole)
    expected = torch.autograd.grad(whole, (chosen, rejected), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(parts.mean(), (chosen, rejected)), expected)


# The policy losses, one by one.

GAPS = batch(-10.0, -20.0, (-12.0, -15.0), (4, 10))
"""Log-ratios +2 and -5, over 4 and 10 tokens +0.5 and -0.5."""
HALVES = batch(3 * math.log(0.5), 2 * math.log(0.25), counts=(3, 2))
"""Geometric means p = 1/2 and 1/4, so odds 1 and 1/3, odds ratio 3 and sigmoid(ln 3) = 3/4."""


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (losses.dpo_loss(GAPS, beta=0.1), softplus(-0.7)),
        (
            losses.dpo_loss(GAPS, beta=0.1, label_smoothing=0.2),
            0.8 * softplus(-0.7) + 0.2 * softplus(0.7),
        ),
        (losses.reference_free_dpo_loss(GAPS, beta=0.1), softplus(-1.0)),
        # means -2.5 and -2: e^-2.5 + e^-2 = 0.217420
        (losses.dpo_likelihood_loss(GAPS, beta=0.1), softplus(-0.7) - math.log(0.217420)),
        (losses.ipo_loss(GAPS, beta=0.1), 16.0),  # gap 1, target 1 / (2 * 0.1) = 5
        # means -2.5 and -2: 2 * -0.5 - gamma 0.4
        (losses.simpo_loss(GAPS, beta=2.0, gamma=0.4), softplus(1.4)),
        (losses.orpo_loss(HALVES, beta=0.1), math.log(2) - 0.1 * math.log(0.75)),
        # log-ratios ln 3 and -ln 3: 1 - sigmoid(ln 3) = 1/4 on either side
        (losses.kto_loss(batch(math.log(3), -math.log(3)), beta=1.0), 0.25),
        (losses.sft_loss(GAPS), 2.5),
        (losses.sft_logsigmoid_loss(batch(-20.0, -1.0), beta=0.1), softplus(2.0)),
    ],
)
def test_policy_losses_by_hand(loss: Tensor, expected: float) -> None:
    torch.testing.assert_close(loss, torch.tensor([expected]))


def test_orpo_odds_are_exact_for_nearly_certain_and_nearly_impossible_responses() -> None:
    """Against float64 arithmetic: 1 - exp(x) loses every digit in float32 near x = 0."""
    for mean in (-1e-6, -1e-4, -0.1, -0.6931, -0.6932, -5.0, -30.0):
        odds = mean - math.log(-math.expm1(mean)) + 1.0 + math.log(-math.expm1(-1.0))
        loss = losses.orpo_loss(batch(mean, -1.0), beta=1.0)
        assert loss.item() == pytest.approx(-mean + softplus(-odds), rel=1e-6, abs=1e-6)


# All policy losses alike.


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_policy_losses_look_at_no_neighbours_and_their_gradients_equal_finite_differences(
    name: str,
) -> None:
    """One comparison at a time gives the same numbers: otherwise packing would change gradients."""
    given = random_batch(6)
    columns = [getattr(given, field.name) for field in fields(PolicyLogps)]
    alone = [call(name, PolicyLogps(*(c[i : i + 1] for c in columns))) for i in range(6)]
    torch.testing.assert_close(call(name, given), torch.cat(alone))

    def loss(chosen: Tensor, rejected: Tensor) -> Tensor:
        return call(name, replace(given, chosen_logps=chosen, rejected_logps=rejected))

    inputs = (given.chosen_logps.requires_grad_(), given.rejected_logps.requires_grad_())
    assert torch.autograd.gradcheck(loss, inputs, eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", POLICY_LOSSES)
@pytest.mark.parametrize("counts", [1, 500])
def test_policy_losses_and_gradients_are_finite_at_extremes(name: str, counts: int) -> None:
    """+-1e4 nat, far beyond any real response, on either side; a log-prob above 0 cannot happen, but
    a loss that answers it with NaN would hide where it came from."""
    values = torch.tensor([-1e4, -1e-8, 0.0, 1e4])
    chosen, rejected = (each.flatten() for each in torch.meshgrid(values, values, indexing="ij"))
    chosen, rejected = chosen.requires_grad_(), rejected.clone().requires_grad_()
    number = torch.full((16,), counts)
    zero = torch.zeros(16)
    loss = call(name, PolicyLogps(chosen, rejected, number, number, zero, zero))
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    for side in (chosen, rejected):
        assert side.grad is None or torch.isfinite(side.grad).all()


@pytest.mark.parametrize("gap", [-1e4, -100.0, 100.0, 1e4])
def test_reward_loss_is_finite_and_exact_at_extremes(gap: float) -> None:
    """-log sigmoid(x) tends to max(0, -x), with gradient 0 or -1; log(sigmoid(x)) would be -inf."""
    chosen = torch.tensor([gap], requires_grad=True)
    loss = reward_loss(chosen, torch.zeros(1), label_smoothing=0.0)
    loss.sum().backward()
    assert loss.item() == pytest.approx(max(0.0, -gap), abs=1e-30)
    assert chosen.grad.item() == pytest.approx(-1.0 if gap < 0 else 0.0, abs=1e-30)


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_policy_losses_of_half_precision_are_computed_in_float32(name: str) -> None:
    half = random_batch(16, torch.bfloat16)
    columns = [getattr(half, each.name) for each in fields(PolicyLogps)]
    full = PolicyLogps(*(c.float() if c.is_floating_point() else c for c in columns))
    got = call(name, half)
    assert got.dtype == torch.float32
    assert torch.equal(got, call(name, full))
    half_loss, full_loss = (reward_loss(b.chosen_logps, b.rejected_logps) for b in (half, full))
    assert half_loss.dtype == torch.float32
    assert torch.equal(half_loss, full_loss)


@pytest.mark.parametrize("name", [n for n, x in POLICY_LOSSES.items() if not x.needs_reference])
def test_a_reference_that_is_not_needed_is_ignored(name: str) -> None:
    given = random_batch(5)
    without = replace(given, reference_chosen_logps=None, reference_rejected_logps=None)
    assert torch.equal(call(name, given), call(name, without))
