"""One optimiser step: packing changes nothing, alpha 0 is Bradley-Terry, and bad numbers stop it."""

import math
from dataclasses import replace

import pytest
import torch

from hafrm.errors import NumericsError
from hafrm.preferences import Comparison, TokenizedGroup
from hafrm.recipe import TrainingSection
from hafrm.training.losses import reward_loss
from hafrm.training.methods import get_method
from hafrm.training.passes import reference_logps
from hafrm.training.step import (
    DECAY,
    MEASURES,
    NonFiniteCheck,
    build_optimizer,
    learning_rate,
    losses_of,
)
from hafrm.training.step_batches import MicroBatch, References
from support.dispatched import Dispatched
from support.models import tiny_hybrid
from support.step_pairs import adamw, micro_batches, one_step, pairs


def frozen(groups: list[TokenizedGroup]) -> References:
    return reference_logps(tiny_hybrid(), groups, max_tokens=500)


def trained(batches: list[MicroBatch], name: str, steps: int = 2, **options: float | str):
    """The model after some steps on the same comparisons, and what each step reports."""
    model, distance, results = tiny_hybrid(seed=0), None, []
    optimizer = adamw(model)
    for _ in range(steps):
        method = get_method(name, **options)
        results.append(one_step(model, batches, method, optimizer, distance=distance))
        distance = results[-1].distance
    return model, results


@pytest.mark.parametrize(
    ("name", "options"), [("haf", {}), ("normbt", {}), ("bsr", {"sum_to_zero": 0.1})]
)
def test_one_sequence_of_sixteen_equals_many_uneven_micro_batches(name, options):
    """Losses to 1e-4 of a sum over 16; weights after two AdamW steps (eps 1e-3, lr 1e-2) to 2e-6."""
    groups = pairs()
    references = frozen(groups) if name == "haf" else None
    whole, small = (micro_batches(groups, budget, references) for budget in (10_000, 40))
    assert (len(whole), len(small) > 4) == (1, True)
    (one, ours), (many, theirs) = (trained(some, name, **options) for some in (whole, small))
    for first, second in zip(ours, theirs, strict=True):
        assert torch.allclose(first.sums, second.sums, rtol=1e-5, atol=1e-4, equal_nan=True)
        torch.testing.assert_close(first.distance, second.distance)
    for (parameter, value), other in zip(one.named_parameters(), many.parameters(), strict=True):
        assert torch.allclose(value, other, atol=2e-6), parameter


def test_dpo_starts_at_ln_2():
    """log pi = log pi_ref at step 0, so -log sigmoid(0) = ln 2, to float32 rounding of the cache."""
    groups = pairs()
    (batch,) = micro_batches(groups, 10_000, frozen(groups))
    model = tiny_hybrid()
    loss = losses_of(model(batch.layout), batch, get_method("dpo"))
    assert torch.allclose(loss.total, torch.full((16,), math.log(2)), atol=1e-5)


def test_measures_are_what_a_slow_computation_gives():
    groups = pairs()
    references = frozen(groups)
    (batch,) = micro_batches(groups, 10_000, references)
    model = tiny_hybrid(seed=1)
    outputs = model(batch.layout)
    margins = (outputs.rewards[batch.chosen] - outputs.rewards[batch.rejected]).detach()
    ratio = (outputs.logps - batch.reference_logps).detach()
    implicit = 0.1 * (ratio[batch.chosen] - ratio[batch.rejected])
    sums = one_step(tiny_hybrid(seed=1), [batch], get_method("haf")).sums
    measured = dict(zip((*MEASURES, "num"), sums.tolist(), strict=True))
    assert measured["num"] == 16
    reward = torch.nn.functional.softplus(-margins).sum().item()
    policy = torch.nn.functional.softplus(-implicit).sum().item()
    assert measured["reward_loss"] == pytest.approx(reward, rel=1e-4)
    assert measured["policy_loss"] == pytest.approx(policy, rel=1e-4)
    assert measured["loss"] == pytest.approx(reward + 0.2 * policy, rel=1e-4)
    assert measured["accuracy"] == (margins > 0).sum().item()
    assert measured["margin"] == pytest.approx(margins.sum().item(), rel=1e-4)
    assert measured["implicit_accuracy"] == (implicit > 0).sum().item()


def test_comparisons_of_weight_0_are_in_neither_side_of_a_metric():
    groups = pairs()
    weightless = [
        replace(g, comparisons=(Comparison(0, 1, weight=0.0),)) if i % 2 else g
        for i, g in enumerate(groups)
    ]
    some, all_of_half = (
        one_step(tiny_hybrid(seed=1), micro_batches(own, 40), get_method("bt")).sums
        for own in (weightless, groups[::2])
    )
    assert some[-1] == all_of_half[-1] == 8
    torch.testing.assert_close(some, all_of_half, equal_nan=True)


def test_a_non_finite_loss_or_gradient_stops_before_the_update_and_names_the_groups():
    groups = pairs()
    groups[3] = replace(groups[3], comparisons=(Comparison(0, 1, margin=math.inf),), id="broken")
    model = tiny_hybrid()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(NumericsError, match=r"loss of this step is not finite.*broken"):
        one_step(model, micro_batches(groups, 40), get_method("bt"))
    model.zero_grad()
    model.reward_head.weight.register_hook(lambda grad: grad * math.nan)
    with pytest.raises(NumericsError, match="gradient of this step is not finite"):
        one_step(model, micro_batches(pairs(), 10_000), get_method("bt"))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


@pytest.mark.parametrize(
    "method",
    [
        get_method("haf"),
        get_method("bt"),
        get_method("grm-sft"),
        get_method("normbt", sum_to_zero=0.1),
    ],
    ids=lambda method: method.name,
)
def test_no_operation_of_a_step_makes_the_host_wait_for_a_device(method):
    """Each of these needs a value or a size from the device: `.item()`, `if tensor`, boolean indexing."""
    model, groups = tiny_hybrid(), pairs()
    batches = micro_batches(groups, 40, frozen(groups))
    optimizer, guard = adamw(model), Unwatched(torch.device("cpu"))
    with Dispatched() as seen:
        one_step(model, batches, method, optimizer, nonfinite=guard)
    assert "_fused_adamw_" in seen.names
    waiting = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "is_nonzero"}
    assert not seen.names & waiting
    with Dispatched() as seen:
        guard.check()
    assert "_local_scalar_dense" in seen.names


def test_the_first_update_of_a_warm_up_is_not_at_rate_0():
    """transformers#34754, verl#3674: half of 6 updates linearly up to the peak, half down."""
    training = TrainingSection(learning_rate=3.0, warmup_fraction=0.5, schedule="linear")
    assert [learning_rate(training, i, 6) for i in range(6)] == [1, 2, 3, 3, 2, 1]


def test_norms_and_biases_do_not_decay():
    model = tiny_hybrid("phi")
    optimizer = build_optimizer(model, weight_decay=0.1, betas=(0.9, 0.999), eps=1e-8)
    decayed, plain = optimizer.param_groups
    assert decayed["weight_decay"] == 0.1
    assert all(p.dim() >= 2 for p in decayed["params"])
    assert plain["weight_decay"] == 0.0
    assert all(p.dim() == 1 for p in plain["params"])


def test_the_penalty_of_a_step_is_that_of_all_its_rewards_together():
    """n * mean^2 and its gradient, from one forward of all pairs, against micro-batches; lambda 0.5."""
    (batch,) = micro_batches(pairs(), 10_000)
    model = tiny_hybrid(seed=0)
    rewards = model(batch.layout).rewards
    chosen, rejected = rewards[batch.chosen], rewards[batch.rejected]
    penalty = 16 * torch.cat([chosen, rejected]).mean() ** 2
    (reward_loss(chosen, rejected).mean() + 0.5 * penalty).backward()
    expected = {name: p.grad.norm() for name, p in model.named_parameters() if p.grad is not None}
    norm = torch.stack(list(expected.values())).norm()
    _, (result,) = trained(micro_batches(pairs(), 40), "bsr", steps=1, sum_to_zero=0.5)
    torch.testing.assert_close(result.grad_norm, norm, rtol=1e-4, atol=0)
    assert penalty.item() > 1e-3  # or the test would see nothing of it


def test_normbt_starts_at_the_mean_distance_of_its_first_step_and_averages_from_there():
    (batch,) = micro_batches(pairs(), 10_000)
    with torch.no_grad():
        states = tiny_hybrid(seed=0).last_states(batch.layout)
    mean = (states[batch.chosen] - states[batch.rejected]).norm(dim=1).mean()
    normbt, before = get_method("normbt"), torch.tensor(7.0)
    first, later = (
        one_step(tiny_hybrid(seed=0), [batch], normbt, distance=d).distance for d in (None, before)
    )
    torch.testing.assert_close(first, mean)
    torch.testing.assert_close(later, DECAY * 7.0 + (1 - DECAY) * mean)


def an_optimizer() -> tuple[torch.nn.Parameter, torch.optim.AdamW]:
    parameter = torch.nn.Parameter(torch.ones(3))
    return parameter, torch.optim.AdamW([parameter], lr=0.1, fused=True)


class Unwatched(NonFiniteCheck):
    """A guard as on a GPU: nothing is looked at before somebody asks."""

    def check_now(self) -> None:
        """Left to the caller."""


def test_a_broken_step_and_all_after_it_leave_weights_and_moments_until_the_host_looks():
    parameter, optimizer = an_optimizer()
    guard = Unwatched(torch.device("cpu"))
    batches = micro_batches(pairs(), 40)
    for step, finite in enumerate((True, False, True)):
        parameter.grad = torch.full((3,), 1.0 + step)
        flags = torch.tensor([True] * len(batches) + [finite])
        guard.protect(optimizer, batches, flags)
        optimizer.step()
        if step == 0:
            after_first = parameter.detach().clone()
            moments = {k: v.clone() for k, v in optimizer.state[parameter].items()}
    assert not torch.equal(after_first, torch.ones(3))
    assert torch.equal(parameter.detach(), after_first)
    for name, value in moments.items():
        assert torch.equal(optimizer.state[parameter][name], value), name
    with pytest.raises(NumericsError, match="gradient of this step is not finite"):
        guard.check()


def test_the_groups_named_are_those_of_the_first_broken_step():
    _, optimizer = an_optimizer()
    guard = Unwatched(torch.device("cpu"))
    first, second, third = ([batch] for batch in micro_batches(pairs(), 40)[:3])
    for batches, finite in ((first, True), (second, False), (third, False)):
        guard.protect(optimizer, batches, torch.tensor([finite, True]))
    with pytest.raises(NumericsError) as caught:
        guard.check()
    assert all(name in str(caught.value) for name in second[0].ids)
    assert not any(f"{name}," in str(caught.value) for name in first[0].ids)
