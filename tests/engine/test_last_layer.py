"""The last layer runs what heads read and no more, and nobody can tell by the numbers."""

import copy
import threading

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hafrm.engine.attention import narrow_layer, widen_layer
from hafrm.engine.layout import lay_out
from hafrm.engine.model import HybridModel, decoder_layers, new_reward_head
from hafrm.scoring.forward import run_forward
from support.models import FAMILIES, SHAPES, tiny_causal_lm, tiny_hybrid, token_groups


def reward_model(family: str) -> HybridModel:
    """The family's backbone with a reward head alone."""
    causal = tiny_causal_lm(family)
    head = new_reward_head(32, torch.Generator().manual_seed(0))
    return HybridModel(causal.base_model, reward_head=head)


def rewards_and_gradients(model: HybridModel) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    rewards = model(lay_out(token_groups(SHAPES))).rewards
    (rewards * torch.arange(1.0, 1 + len(rewards))).sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return rewards.detach(), grads


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reward_model_that_runs_last_tokens_only_equals_a_whole_run(family):
    """Rewards to 1e-5; gradients to 1e-5 of the largest entry: sums over fewer zeros, reassociated."""
    model = reward_model(family)
    found, grads = rewards_and_gradients(model)
    widen_layer(decoder_layers(model.backbone)[-1])
    whole, whole_grads = rewards_and_gradients(model)
    torch.testing.assert_close(found, whole, atol=1e-5, rtol=1e-5)
    assert grads.keys() == whole_grads.keys()
    for name, grad in grads.items():
        scale = max(1.0, whole_grads[name].abs().max().item())
        torch.testing.assert_close(grad, whole_grads[name], atol=1e-5 * scale, rtol=0), name


def test_two_models_over_one_backbone_read_each_what_it_needs():
    """A reward model put over a policy's backbone spares what the policy's log-probs need."""
    both = tiny_hybrid()
    layout = lay_out(token_groups(SHAPES))
    expected = both(layout).logps
    rewards_only = HybridModel(both.backbone, reward_head=both.reward_head)
    torch.testing.assert_close(rewards_only(layout).rewards, both(layout).rewards)
    assert torch.equal(both(layout).logps, expected)


def test_a_copied_model_narrows_its_own_layer_and_threads_their_own_rows():
    model = reward_model("llama").eval()
    groups = token_groups(SHAPES * 4)
    expected = run_forward(model, groups, max_tokens=1000).rewards
    for _ in range(3):
        copied = copy.deepcopy(model)
        found = run_forward(copied, groups, max_tokens=30, threads=3).rewards
        np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-5)
    last = decoder_layers(copied.backbone)[-1]
    widen_layer(last)
    assert not last.mlp._forward_hooks
    assert decoder_layers(model.backbone)[-1].mlp._forward_hooks


def gradients(model: HybridModel, *, other_thread: bool) -> dict[str, Tensor]:
    """Of both heads' sum, by a backward pass in this thread or in another, as autograd runs it on CUDA."""
    outputs = model(lay_out(token_groups(SHAPES)))
    loss = outputs.rewards.sum() + outputs.logps.sum()
    if other_thread:
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
    else:
        loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointed_layers_are_repeated_alike_by_a_backward_pass_in_another_thread(family):
    """The same operations on the same numbers, so the same gradients to the bit."""
    expected = gradients(tiny_hybrid(family), other_thread=False)
    model = tiny_hybrid(family)
    model.checkpoint_activations()
    found = gradients(model, other_thread=True)
    assert found.keys() == expected.keys()
    assert [n for n, grad in found.items() if not torch.equal(grad, expected[n])] == []


def test_experts_and_layers_of_another_build_are_left_whole():
    """Routing may look at all tokens at once; without an attention nothing says which rows are read."""
    layer = nn.Module()
    layer.mlp = nn.Linear(2, 2)
    assert narrow_layer(layer) == []
    layer = nn.Module()
    layer.mlp = nn.Module()
    layer.mlp.experts = nn.ModuleList([nn.Linear(2, 2)])
    layer.self_attn = nn.Module()
    layer.self_attn.q_proj = nn.Linear(2, 2)
    assert narrow_layer(layer) == ["self_attn.q_proj"]
