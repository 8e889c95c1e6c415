"""alpha auto: the norms are those of two backward passes, and nothing but the data decides alpha."""

import math

import pytest
import torch
from torch import Tensor

from hafrm.engine.model import HybridModel
from hafrm.training.balance import DECAY, MOST, Balance, Weighing, new_balance
from hafrm.training.batches import MicroBatch
from hafrm.training.methods import get_method
from hafrm.training.reference import reference_logps
from hafrm.training.step import build_optimizer, losses_of, take_step
from models_for_tests import tiny_hybrid
from training_for_tests import micro_batches, pairs

CPU = torch.device("cpu")
AUTO = get_method("haf", alpha="auto", gradient_ratio=0.5)


def balance(reward: float, policy: float) -> Balance:
    return Balance(0.5, 0.2, torch.tensor([reward, policy]))


def step_of(max_tokens: int) -> list[MicroBatch]:
    groups = pairs()
    references = reference_logps(tiny_hybrid(seed=7), groups, max_tokens=500)
    return micro_batches(groups, max_tokens, references)


def test_alpha_makes_the_norms_keep_the_ratio():
    """Norms 0.3 and 2: alpha * 2 = 0.5 * 0.3 at alpha 0.075."""
    assert float(balance(0.09, 4.0).alpha()) == pytest.approx(0.075)


def test_alpha_starts_where_the_method_does_and_a_silent_head_does_not_take_it_anywhere():
    """0 / 0 is nothing known; 1 / 0 and 0 / 1 stop at 1000 times up and down."""
    assert float(balance(0.0, 0.0).alpha()) == pytest.approx(0.2)
    assert float(balance(1.0, 0.0).alpha()) == pytest.approx(0.2 * MOST)
    assert float(balance(0.0, 1.0).alpha()) == pytest.approx(0.2 / MOST)


def test_the_average_remembers_nine_tenths():
    """0.9 * (0.09, 4) + 0.1 * (1, 0) = (0.181, 3.6); after one step alone alpha is that step's."""
    assert DECAY == 0.9
    later = balance(0.09, 4.0).after(torch.tensor([1.0, 0.0]))
    assert later.averages.tolist() == pytest.approx([0.181, 3.6])
    first = balance(0.0, 0.0).after(torch.tensor([0.09, 4.0]))
    assert float(first.alpha()) == pytest.approx(0.075)


def test_a_constant_alpha_has_no_balance():
    assert new_balance(get_method("haf"), CPU) is None


def two_backwards(model: HybridModel, batch: MicroBatch) -> list[float]:
    """Squared norms of d loss / d last hidden state, one loss at a time, each response a row of its own."""
    model.share(False)
    seen: list[Tensor] = []
    handle = model.backbone.register_forward_hook(lambda *a: seen.append(a[2].last_hidden_state))
    loss = losses_of(model(batch.layout), batch, AUTO)
    handle.remove()
    assert loss.reward is not None
    assert loss.policy is not None
    norms = []
    for part in (loss.reward, loss.policy):
        (grad,) = torch.autograd.grad((part * batch.weights).sum() / 16, seen, retain_graph=True)
        norms.append(float(grad.double().square().sum()))
    model.share(True)
    return norms


def measured(model: HybridModel, batches: list[MicroBatch], method=AUTO) -> list[float]:
    """The same as a step sees them, over its micro-batches."""
    weighing = Weighing(new_balance(method, CPU), CPU)
    for batch in batches:
        loss = losses_of(model(batch.layout, weighing.watch), batch, method, weighing.alpha)
        (loss.total.sum() / 16).backward()
    return weighing.squares().tolist()


@pytest.mark.parametrize("how", ["full", "frozen heads", "checkpointing"])
def test_the_norms_are_those_of_two_separate_backward_passes(how):
    """Float32 sums of squares in another order: 1e-4 of their value."""
    model = tiny_hybrid()
    if how == "frozen heads":
        model.policy_head.requires_grad_(False)
    if how == "checkpointing":
        model.checkpoint_activations()
    (whole,) = step_of(10_000)
    expected = two_backwards(model, whole)
    assert measured(model, [whole]) == pytest.approx(expected, rel=1e-4)
    assert measured(model, step_of(40)) == pytest.approx(expected, rel=1e-4)


def test_the_reward_weight_is_in_the_norm_and_alpha_is_not():
    """Weight 0.5 quarters the square of the reward's; another start of alpha moves the policy's nowhere."""
    (whole,) = step_of(10_000)
    reward, policy = measured(tiny_hybrid(), [whole])
    other = get_method("grm-dpo", reward_weight=0.5, alpha="auto")
    assert other.alpha == 0.01
    assert measured(tiny_hybrid(), [whole], other) == pytest.approx([reward / 4, policy], rel=1e-4)


def trajectory(batches: list[MicroBatch], *, sharing: bool = True) -> list[float]:
    """alpha of three steps over the same comparisons."""
    model = tiny_hybrid(sharing=sharing)
    optimizer = build_optimizer(model, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-3)
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[-1]["lr"] = 1e-2
    state, alphas = new_balance(AUTO, CPU), []
    for _ in range(3):
        result = take_step(
            model,
            optimizer,
            batches,
            AUTO,
            num_comparisons=16,
            max_grad_norm=1.0,
            balance=state,
        )
        assert result.alpha is not None
        state = result.balance
        alphas.append(float(result.alpha))
    return alphas


def test_neither_packing_nor_sharing_changes_alpha():
    """One micro-batch, uneven ones, single comparisons, and each response alone: 1e-3 of alpha."""
    whole = trajectory(step_of(10_000))
    assert whole[0] == pytest.approx(AUTO.alpha)
    assert len(set(whole)) == 3
    for max_tokens, least in ((40, 6), (1, 16)):
        batches = step_of(max_tokens)
        assert len(batches) >= least
        assert trajectory(batches) == pytest.approx(whole, rel=1e-3)
    assert trajectory(step_of(10_000), sharing=False) == pytest.approx(whole, rel=1e-3)


def test_looking_at_gradients_leaves_a_step_as_it_is():
    """At its first step auto has the constant's alpha, so weights are equal to the bit."""
    weights = []
    for method in (get_method("haf"), AUTO):
        model = tiny_hybrid()
        optimizer = build_optimizer(model, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-3)
        optimizer.param_groups[0]["lr"] = 1e-2
        take_step(
            model,
            optimizer,
            step_of(40),
            method,
            num_comparisons=16,
            max_grad_norm=1.0,
            balance=new_balance(method, CPU),
        )
        weights.append(model.state_dict())
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


def test_a_state_survives_being_written_as_json():
    first = balance(0.1, math.pi).averages
    again = new_balance(AUTO, CPU, first.tolist())
    assert again is not None
    assert torch.equal(again.averages, first)
