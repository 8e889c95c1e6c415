"""Means over a whole step: neither packing nor a resume changes what NormBT and BSR learn."""

import pytest
import torch

from hafrm.training.losses import reward_loss
from hafrm.training.methods import get_method
from hafrm.training.step import DECAY, build_optimizer, take_step
from hafrm.training.step_batches import MicroBatch
from models_for_tests import tiny_hybrid
from support.step_pairs import micro_batches, pairs


def trained(batches: list[MicroBatch], name: str, steps: int = 2, **options: float | str):
    """The model after some steps on the same comparisons, and what each step reports."""
    model = tiny_hybrid(seed=0)
    optimizer = build_optimizer(model, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-3)
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    distance, results = None, []
    for _ in range(steps):
        result = take_step(
            model,
            optimizer,
            batches,
            get_method(name, **options),
            num_comparisons=16,
            max_grad_norm=1.0,
            distance=distance,
        )
        distance = result.distance
        results.append(result)
    return model, results


@pytest.mark.parametrize(("name", "options"), [("normbt", {}), ("bsr", {"sum_to_zero": 0.1})])
def test_packing_changes_neither_losses_nor_weights(name, options):
    """Losses to 1e-4 of a sum over 16; weights after two AdamW steps (eps 1e-3, lr 1e-2) to 2e-6."""
    whole, small = micro_batches(pairs(), 10_000), micro_batches(pairs(), 40)
    assert (len(whole), len(small) > 4) == (1, True)
    (one, ours), (many, theirs) = (trained(some, name, **options) for some in (whole, small))
    for first, second in zip(ours, theirs, strict=True):
        assert torch.allclose(first.sums, second.sums, rtol=1e-5, atol=1e-4, equal_nan=True)
        torch.testing.assert_close(first.distance, second.distance)
    for (parameter, value), other in zip(one.named_parameters(), many.parameters(), strict=True):
        assert torch.allclose(value, other, atol=2e-6), parameter


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
    model = tiny_hybrid(seed=0)
    with torch.no_grad():
        states = model.last_states(batch.layout)
    mean = (states[batch.chosen] - states[batch.rejected]).norm(dim=1).mean()
    _, results = trained([batch], "normbt", steps=1)
    torch.testing.assert_close(results[0].distance, mean)
    again = take_step(
        tiny_hybrid(seed=0),
        build_optimizer(tiny_hybrid(seed=0), weight_decay=0.0, betas=(0.9, 0.999), eps=1e-3),
        [batch],
        get_method("normbt"),
        num_comparisons=16,
        max_grad_norm=1.0,
        distance=torch.tensor(7.0),
    )
    torch.testing.assert_close(again.distance, DECAY * 7.0 + (1 - DECAY) * mean)


def test_equal_distances_leave_bradley_terry():
    """A pair alone in its step has the mean distance: its factor is 1 but for epsilon."""
    (batch,) = micro_batches(pairs()[:1], 10_000)

    def loss(name: str) -> float:
        model = tiny_hybrid(seed=0)
        optimizer = build_optimizer(model, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-3)
        result = take_step(
            model, optimizer, [batch], get_method(name), num_comparisons=1, max_grad_norm=1.0
        )
        return float(result.sums[0])

    assert loss("normbt") == pytest.approx(loss("bt"), rel=1e-4)
