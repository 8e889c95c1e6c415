"""A response's numbers belong to it alone: order, packing, neighbours and padding change nothing."""

import numpy as np
import pytest
import torch
from torch import Tensor

from hafrm.engine.layout import lay_out
from hafrm.engine.model import HybridModel
from hafrm.scoring.forward import first_fit_decreasing
from support.models import SHAPES, TokenGroup, stock_classifier, tiny_hybrid, token_groups

FAMILIES = ["llama", "mistral", "gemma2", "gpt2"]
"""Rotary; a window smaller than the pairs; soft-capping and both kinds of layer; learned positions."""
TOLERANCE = 1e-5
"""float32: other shapes let the same sums be taken in another order, nothing else."""


@torch.no_grad()
def score(model: HybridModel, groups: list[TokenGroup]) -> list[tuple[Tensor, Tensor]]:
    """(rewards, log-probs) of every group's responses, from one row."""
    outputs = model(lay_out(groups))
    counts = [len(group.response_ids) for group in groups]
    return list(zip(outputs.rewards.split(counts), outputs.logps.split(counts), strict=True))


def assert_same(found: list[tuple[Tensor, Tensor]], expected: list[tuple[Tensor, Tensor]]) -> None:
    for pair, other in zip(found, expected, strict=True):
        for values, wanted in zip(pair, other, strict=True):
            torch.testing.assert_close(values, wanted, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_any_order_and_any_packing_into_sequences_gives_the_same_numbers(family):
    """Budgets from one group to a sequence (40 is its largest) to everything in one."""
    model, groups = tiny_hybrid(family), token_groups(SHAPES + SHAPES)
    expected = score(model, groups)
    sizes = [len(g.prompt_ids) + sum(map(len, g.response_ids)) for g in groups]
    for seed, budget in enumerate((1, 40, 64, 1000)):
        for members in first_fit_decreasing(sizes, budget):
            order = np.random.default_rng(seed).permutation(members)
            assert_same(score(model, [groups[i] for i in order]), [expected[i] for i in order])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("branches", range(1, 9))
def test_k_branches_are_k_single_scorings(branches, family):
    """One-token branches and one-token prompts among them."""
    lengths = (6, 1, 11, 3, 1, 8, 2, 5)[:branches]
    model = tiny_hybrid(family)
    for prompt in (10, 1):
        (group,) = token_groups(((prompt, lengths),))
        rewards, logps = score(model, [group])[0]
        alone = [score(model, [TokenGroup(group.prompt_ids, (r,))])[0] for r in group.response_ids]
        expected = (torch.cat([r for r, _ in alone]), torch.cat([p for _, p in alone]))
        assert_same([(rewards, logps)], [expected])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_responses_numbers_have_no_gradient_at_tokens_that_it_may_not_see(family):
    """Exactly zero at other branches and other groups; the prompt's last token reaches all of its own."""
    model = tiny_hybrid(family)
    layout = lay_out(token_groups(((6, (4, 5, 3)), (5, (2, 4)))))
    seen = []
    model.backbone.get_input_embeddings().register_forward_hook(lambda *args: seen.append(args[2]))
    outputs = model(layout)
    (embedded,) = seen
    branches = [(6, 6, 10), (6, 10, 15), (6, 15, 18), (23, 23, 25), (23, 25, 29)]
    for response, (prompt_end, start, end) in enumerate(branches):
        prompt = range(0 if prompt_end == 6 else 18, prompt_end)
        for value in (outputs.rewards[response], outputs.logps[response]):
            (grad,) = torch.autograd.grad(value, embedded, retain_graph=True)
            reached = set(grad[0].abs().sum(-1).nonzero()[:, 0].tolist())
            assert reached <= {*prompt, *range(start, end)}
            assert prompt[-1] in reached


PAD, EOS = 0, 2


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_stock_classifier_padded_on_either_side_gives_our_rewards(family, side):
    """What consumers of the exported model run, on pairs of very different length, with an EOS (which
    is not pad) at the end of every response."""
    model = tiny_hybrid(family)
    stock = stock_classifier(family, model, PAD, EOS)
    groups = [
        TokenGroup(g.prompt_ids, tuple(np.append(r, np.int32(EOS)) for r in g.response_ids))
        for g in token_groups(SHAPES)
    ]
    sequences = [
        torch.tensor([*g.prompt_ids.tolist(), *r.tolist()]) for g in groups for r in g.response_ids
    ]
    ids = torch.nn.utils.rnn.pad_sequence(
        sequences, batch_first=True, padding_value=PAD, padding_side=side
    )
    mask = torch.nn.utils.rnn.pad_sequence(
        [torch.ones_like(s) for s in sequences], batch_first=True, padding_side=side
    )
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        rewards = model(lay_out(groups)).rewards
        found = stock(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, 0]
    torch.testing.assert_close(found, rewards, atol=TOLERANCE, rtol=TOLERANCE)
