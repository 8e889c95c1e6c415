"""The work of a step, counted in floating-point operations: a speed test that needs no timer."""

import pytest
import torch
import transformers
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from hafrm.engine.layout import Layout, lay_out
from hafrm.engine.model import HybridModel, new_reward_head, split_causal_lm
from support.counted_flops import COUNTED
from support.models import token_groups

WIDTH, LAYERS, VOCAB = 384, 6, 32000
HEAD = WIDTH * VOCAB
GROUPS = ((67, (31, 22)), (41, (13, 29)), (52, (18, 18, 9)))
"""The shape of HH-RLHF at 2/5 of its size: prompts longer than responses; one prompt with three."""
TOLERANCE = 0.001
"""Left out of the formulas: the reward head, 5e-7 of a step. Not counted at all: what is no product."""


def small_llama(*, policy_head: bool = True) -> HybridModel:
    """Six layers of width 384 over 32,000 words: 10.6 M matmul parameters, and 12.3 M in the head."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=1024,
        num_hidden_layers=LAYERS,
        num_attention_heads=6,
        max_position_embeddings=256,
    )
    backbone, head = split_causal_lm(transformers.LlamaForCausalLM(config))
    return HybridModel(
        backbone,
        reward_head=new_reward_head(WIDTH, torch.Generator().manual_seed(0)),
        policy_head=head if policy_head else None,
    )


def matmul_parameters(model: HybridModel) -> int:
    """N_b: what multiplies every token; no embedding, no head."""
    return sum(p.numel() for p in model.backbone.layers.parameters() if p.dim() == 2)


def attention_flops(layout: Layout) -> float:
    """A of all layers forward: 4 d L (q (k - q) + q^2 / 2), summed over the segments."""
    pairs = zip(layout.query_lengths, layout.key_lengths, strict=True)
    return 4 * WIDTH * LAYERS * sum(q * (k - q) + q * q / 2 for q, k in pairs)


def spared(layout: Layout, read: int) -> int:
    """Weights times tokens that the last layer leaves out: queries, output product and MLP of all tokens
    but those that a head reads."""
    return (2 * WIDTH * WIDTH + 3 * WIDTH * 1024) * (layout.num_tokens - read)


READ = 140 + 3
"""All response tokens, and the last token of each of three prompts."""


def count(model: HybridModel, layout: Layout, *, train: bool = True) -> int:
    """FLOPs of a joint step: Bradley-Terry plus a policy loss on neighbouring responses."""
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        if not train:
            with torch.no_grad():
                model(layout)
        else:
            outputs = model(layout)
            loss = F.softplus(outputs.rewards[1:] - outputs.rewards[:-1]).sum()
            if outputs.logps is not None:
                loss = loss + 0.2 * F.softplus(outputs.logps[1:] - outputs.logps[:-1]).sum()
            loss.backward()
    return counter.get_total_flops()


@pytest.fixture(scope="module")
def layout() -> Layout:
    layout = lay_out(token_groups(GROUPS, vocab=VOCAB))
    assert layout.num_tokens == 300  # T_sh: each prompt once
    assert len(layout.targets) == 140  # y
    return layout


BOTH = {"policy_head": True}
STEPS = {
    # forward and two gradients per product; the head's logits once more
    "joint": (BOTH, {}, (6, 8, 3)),
    # as under LoRA: no weight gradients, and the head's part of the gradient is taken in forward
    "frozen": (BOTH, {"frozen": True}, (4, 4, 3)),
    "reward only": ({"policy_head": False}, {}, (6, 0, 3)),
    "reference": (BOTH, {"train": False}, (2, 2, 1)),
    # one more forward of the backbone
    "checkpointed": (BOTH, {"checkpointed": True}, (8, 8, 4)),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_costs_its_products_and_no_more(layout, name):
    """a N_b T_sh + b H y + c A: per backbone weight and token, head weight and target, and attention.
    What no head reads is spared the last layer: all but seven last tokens without a policy head."""
    heads, options, (backbone, head, attention) = STEPS[name]
    model = small_llama(**heads)
    n_b = matmul_parameters(model)
    assert n_b == 6 * (4 * 384 * 384 + 3 * 384 * 1024)
    expected = backbone * n_b * 300 + head * HEAD * 140 + attention * attention_flops(layout)
    expected -= backbone * spared(layout, READ if head else 7)
    if options.get("frozen"):
        # norms are trained in the adapters' place: the gradient runs down to the first layer's input
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.dim() == 1)
        model.reward_head.requires_grad_()
    if options.get("checkpointed"):
        model.checkpoint_activations()
        # nor is a layer's last product run again (down_proj), whose output no gradient needs
        expected -= 2 * WIDTH * 1024 * (5 * 300 + READ)
    counted = count(model, layout, train=options.get("train", True))
    assert counted == pytest.approx(expected, rel=TOLERANCE)


def test_unshared_and_padded_the_backbone_costs_the_padded_tokens(layout):
    """Seven rows of 98 tokens (67 + 31): 686 against 300."""
    model = small_llama()
    model.share(False)
    attention = 4 * WIDTH * LAYERS * 7 * 98 * 98 / 2
    expected = 6 * matmul_parameters(model) * 7 * 98 + 8 * HEAD * 140 + 3 * attention
    assert count(model, layout) == pytest.approx(expected, rel=TOLERANCE)
