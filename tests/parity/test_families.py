"""Shared and packed equals plain and padded, for every family: outputs, losses and all gradients."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hafrm.engine.layout import lay_out
from hafrm.engine.model import HybridModel, Outputs
from support.models import (
    FAMILIES,
    SHAPES,
    one_at_a_time,
    tiny_causal_lm,
    tiny_hybrid,
    token_groups,
)

TOLERANCE = 1e-5
"""float32, values of order 1 to 100: reassociated sums, nothing else."""


def joint_loss(outputs: Outputs) -> Tensor:
    """Bradley-Terry on the first two responses plus 0.2 DPO against a zero reference."""
    assert outputs.rewards is not None and outputs.logps is not None
    rewards = F.softplus(outputs.rewards[1::2] - outputs.rewards[:-1:2])
    policy = F.softplus(0.1 * (outputs.logps[1::2] - outputs.logps[:-1:2]))
    return (rewards + 0.2 * policy).sum()


def run(model: HybridModel, seed: int = 0) -> tuple[Outputs, Tensor, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    outputs = model(lay_out(token_groups(SHAPES, seed)))
    loss = joint_loss(outputs)
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return outputs, loss.detach(), grads


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_packed_equals_plain_padded_in_outputs_losses_and_all_gradients(family):
    """Relative to max(1, |value|) for outputs and to the gradient's largest entry for gradients."""
    model = tiny_hybrid(family)
    shared, shared_loss, shared_grads = run(model)
    model.share(False)
    plain, plain_loss, plain_grads = run(model)

    assert torch.allclose(shared.rewards, plain.rewards, rtol=TOLERANCE, atol=TOLERANCE)
    assert torch.allclose(shared.logps, plain.logps, rtol=TOLERANCE, atol=TOLERANCE)
    assert torch.allclose(shared_loss, plain_loss, rtol=TOLERANCE, atol=TOLERANCE)
    assert shared_grads.keys() == plain_grads.keys() == dict(model.named_parameters()).keys()
    for name, grad in shared_grads.items():
        scale = max(1.0, plain_grads[name].abs().max().item())
        assert torch.allclose(grad, plain_grads[name], rtol=0, atol=TOLERANCE * scale), name


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_padded_equals_one_response_at_a_time_through_the_stock_model(family):
    """The unshared run is itself held to the plainest one there is."""
    model, groups = tiny_hybrid(family, sharing=False), token_groups(SHAPES)
    outputs = model(lay_out(groups))
    rewards, logps = one_at_a_time(tiny_causal_lm(family), model.reward_head, groups)
    torch.testing.assert_close(outputs.rewards, rewards, atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(outputs.logps, logps, atol=TOLERANCE, rtol=TOLERANCE)
    assert outputs.lengths.tolist() == [len(ids) for g in groups for ids in g.response_ids]
