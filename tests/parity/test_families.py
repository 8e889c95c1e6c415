"""Shared and packed equals plain and padded, for every family: outputs, losses and all gradients."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hafrm.engine.layout import lay_out
from hafrm.engine.model import HybridModel, Outputs
from support.models import FAMILIES, SHAPES, tiny_causal_lm, tiny_hybrid, token_groups

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
    """The unshared twin is itself held to the plainest run there is: one sequence, no padding."""
    model, stock = tiny_hybrid(family, sharing=False), tiny_causal_lm(family)
    groups = token_groups(SHAPES)
    outputs = model(lay_out(groups))
    index = 0
    for group in groups:
        for response in group.response_ids:
            ids = torch.tensor([[*group.prompt_ids, *response]])
            hidden = stock.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
            reward = model.reward_head(hidden[-1])[0]
            logits = stock(input_ids=ids, use_cache=False).logits[0]
            start = len(group.prompt_ids)
            logps = logits.log_softmax(-1)[start - 1 : -1].gather(1, ids[0, start:, None])
            assert torch.allclose(outputs.rewards[index], reward, atol=TOLERANCE, rtol=TOLERANCE)
            assert torch.allclose(outputs.logps[index], logps.sum(), atol=TOLERANCE, rtol=TOLERANCE)
            assert outputs.lengths[index] == len(response)
            index += 1
