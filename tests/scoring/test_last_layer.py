"""A last layer narrowed to the tokens that are read gives the same rewards, with less work."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hafrm.engine.layout import lay_out
from hafrm.engine.model import HybridModel
from hafrm.scoring.last_layer import LastTokens, narrow_last_layer
from models_for_tests import FAMILIES, SHAPES, tiny_hybrid, token_groups

LAYOUT = lay_out(token_groups(SHAPES))


def reward_only(family: str = "llama") -> HybridModel:
    model = tiny_hybrid(family)
    return HybridModel(model.backbone, reward_head=model.reward_head).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_rewards_are_the_same_in_every_family(family):
    model = reward_only(family)
    with torch.no_grad():
        before = model(LAYOUT).rewards
        narrow_last_layer(model)
        narrowed = LastTokens.of(LAYOUT)
        torch.testing.assert_close(model(narrowed).rewards, before, atol=1e-5, rtol=1e-5)
        model.share(False)  # one padded row for each response: every token is in one that is read
        torch.testing.assert_close(model(narrowed).rewards, before, atol=1e-5, rtol=1e-5)


def test_the_work_saved_is_the_last_layers_mlp_queries_and_output_product_of_other_tokens():
    """2 * parameters * tokens for each product, of all tokens but the 12 that are read."""
    model = reward_only()
    with torch.no_grad():
        with FlopCounterMode(display=False) as whole:
            model(LAYOUT)
        assert narrow_last_layer(model) == ["mlp", "self_attn.q_proj", "self_attn.o_proj"]
        assert narrow_last_layer(model) == ["mlp", "self_attn.q_proj", "self_attn.o_proj"]
        with FlopCounterMode(display=False) as narrowed:
            model(LastTokens.of(LAYOUT))
    last = model.backbone.layers[-1]
    parts = (*last.mlp.parameters(), last.self_attn.q_proj.weight, last.self_attn.o_proj.weight)
    spared = 2 * sum(p.numel() for p in parts) * (LAYOUT.num_tokens - LAYOUT.num_responses)
    assert whole.get_total_flops() - narrowed.get_total_flops() == spared


def test_a_narrowed_backbone_still_gives_log_probs_in_another_model():
    """They need the last layer of every token, and ask for it by a layout that promises nothing."""
    both = tiny_hybrid().eval()
    with torch.no_grad():
        before = both(LAYOUT).logps
        narrow_last_layer(HybridModel(both.backbone, reward_head=both.reward_head))
        assert torch.equal(both(LAYOUT).logps, before)
        assert not torch.equal(both(LastTokens.of(LAYOUT)).logps, before)


def test_a_backbone_with_layers_of_another_make_is_left_alone():
    model = reward_only("gpt2")
    assert narrow_last_layer(model) == []
    with torch.no_grad():
        assert torch.equal(model(LAYOUT).rewards, model(LastTokens.of(LAYOUT)).rewards)
