"""The two-headed model: where rewards are read, which models may share, and the first-batch check."""

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel
from transformers.activations import NewGELUActivation

from hafrm.engine.attention import SHARED_PREFIX
from hafrm.engine.layout import Layout, lay_out, unshare
from hafrm.engine.logprobs import LogitTransform
from hafrm.engine.model import (
    HybridModel,
    Outputs,
    logit_transform,
    longest_sequence,
    new_reward_head,
    self_check,
    sharing_obstacle,
    split_causal_lm,
)
from hafrm.errors import ModelError, NumericsError
from support.models import (
    FAMILIES,
    GPT2,
    GROUPED,
    SHAPES,
    SIZES,
    VOCAB,
    TokenGroup,
    hybrid_of,
    one_at_a_time,
    sharpened,
    tiny_causal_lm,
    tiny_hybrid,
    token_groups,
)

BOS, EOS, PAD = 1, 2, 0


def assert_close(found: Outputs, rewards: Tensor | None, logps: Tensor | None) -> None:
    """float32, values of order 1 to 100: 1e-5 relative."""
    for value, expected in ((found.rewards, rewards), (found.logps, logps)):
        if expected is None:
            assert value is None
        else:
            torch.testing.assert_close(value, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("sharing", [True, False])
def test_a_response_with_pad_and_eos_inside_is_scored_at_its_last_token(sharing):
    """By position: comparing ids with pad or EOS would stop at the second token of the first response,
    and go before the last token of the third, which ends in pad."""
    responses = ([5, EOS, 9, 7], [PAD, 8, PAD, EOS, 6, EOS], [9, 4, PAD])
    prompt = np.array([BOS, 8, EOS, PAD, 12], np.int32)
    groups = [TokenGroup(prompt, tuple(np.array(r, np.int32) for r in responses))]
    groups += token_groups(SHAPES)
    model = tiny_hybrid("llama", sharing=sharing)
    expected = one_at_a_time(tiny_causal_lm("llama"), model.reward_head, groups)
    found = model(lay_out(groups))
    assert_close(found, *expected)
    assert found.lengths[:3].tolist() == [4, 6, 3]


@pytest.mark.parametrize("sharing", [True, False])
def test_a_model_with_one_head_gives_that_heads_numbers_and_none_for_the_other(sharing):
    both = tiny_hybrid("llama", sharing=sharing)
    layout = lay_out(token_groups(SHAPES))
    expected = both(layout)
    backbone, head = split_causal_lm(tiny_causal_lm("llama"))
    reward_only = HybridModel(backbone, reward_head=both.reward_head, sharing=sharing)
    assert_close(reward_only(layout), expected.rewards, None)
    backbone, head = split_causal_lm(tiny_causal_lm("llama"))
    policy_only = HybridModel(backbone, policy_head=head, sharing=sharing)
    assert_close(policy_only(layout), None, expected.logps)
    assert_close(reward_only(layout), expected.rewards, None)


def test_a_model_without_heads_or_without_an_lm_head_to_split_off_is_refused():
    backbone = split_causal_lm(tiny_causal_lm("llama"))[0]
    with pytest.raises(ModelError, match="reward head, a policy head, or both"):
        HybridModel(backbone)
    with pytest.raises(ModelError, match=r"LlamaModel is not a causal LM.*AutoModelForCausalLM"):
        split_causal_lm(backbone)
    tied = tiny_hybrid("llama-tied")
    assert tied.policy_head.weight is tied.backbone.get_input_embeddings().weight


def test_a_new_reward_head_is_normal_with_variance_one_over_hidden_plus_one():
    """65,535 draws of standard deviation 1/256: their own deviates from it by 0.3 % (one sigma) and
    their mean from zero by 1/256^2."""
    head = new_reward_head(65535, torch.Generator().manual_seed(3))
    assert (head.bias, head.weight.shape, head.weight.dtype) == (None, (1, 65535), torch.float32)
    assert head.weight.std().item() == pytest.approx(1 / 256, rel=0.012)
    assert abs(head.weight.mean().item()) < 4 / 256**2
    again = new_reward_head(65535, torch.Generator().manual_seed(3))
    assert torch.equal(head.weight, again.weight)


@pytest.mark.parametrize("sharing", [True, False])
def test_rewards_and_log_probs_are_float32_over_a_bfloat16_backbone(sharing):
    model = hybrid_of(tiny_causal_lm("llama").bfloat16(), sharing=sharing)
    seen = []
    model.backbone.register_forward_hook(lambda *args: seen.append(args[2].last_hidden_state))
    layout = lay_out(token_groups(((5, (4,)),)))
    outputs = model(layout)
    assert seen[0].dtype == torch.bfloat16
    assert model.reward_head.weight.dtype == torch.float32
    assert outputs.rewards.dtype == outputs.logps.dtype == torch.float32
    # To the bit what a float32 product gives, not what a bfloat16 one does.
    expected = F.linear(seen[0][0, -1:].float(), model.reward_head.weight)[:, 0]
    assert torch.equal(outputs.rewards, expected)
    assert not torch.equal(outputs.rewards, outputs.rewards.bfloat16().float())


def test_under_autocast_rewards_and_log_probs_stay_float32_and_close():
    model, layout = tiny_hybrid("llama"), lay_out(token_groups(SHAPES))
    exact = model(layout)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(layout)
    assert outputs.rewards.dtype == outputs.logps.dtype == torch.float32
    assert not torch.equal(outputs.rewards, outputs.rewards.bfloat16().float())
    torch.testing.assert_close(outputs.rewards, exact.rewards, atol=0.1, rtol=0.05)
    torch.testing.assert_close(outputs.logps, exact.logps, atol=0.1, rtol=0.05)


def test_the_lm_heads_scaling_and_soft_capping_are_read_from_the_config():
    """Granite divides by logits_scaling (4), Cohere multiplies by logit_scale (0.25)."""
    capped, scaled = LogitTransform(softcap=5.0), LogitTransform(scale=0.25)
    expected = {"llama": LogitTransform(), "gemma2": capped, "granite": scaled, "cohere": scaled}
    for family, transform in expected.items():
        assert logit_transform(tiny_causal_lm(family).config) == transform


BLOOM = {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4}
FALCON = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
OPT = FAMILIES["opt"][1]
HALF = {"attention_dropout": 0.5, "hidden_dropout": 0.5}
NOISY = {
    "llama": ("Llama", {**GROUPED, "attention_dropout": 0.5}),
    "gpt2": ("GPT2", {**GPT2, "attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5}),
    "gpt-neox": ("GPTNeoX", {**SIZES, **HALF}),
    "opt": ("OPT", {**OPT, "dropout": 0.5, "attention_dropout": 0.5, "activation_dropout": 0.5}),
    "opt-layerdrop": ("OPT", {**OPT, "layerdrop": 0.5}),
    "starcoder2": (
        "Starcoder2",
        {**GROUPED, "attention_dropout": 0.5, "residual_dropout": 0.5, "embedding_dropout": 0.5},
    ),
    "bloom": ("Bloom", {**BLOOM, **HALF}),
    "falcon": ("Falcon", {**FALCON, **HALF}),
    # mixtures of experts multiply what the router reads by noise in training (Phi-3.5-MoE: 0.01)
    "phimoe": ("Phimoe", {**GROUPED, "num_local_experts": 4, "router_jitter_noise": 0.3}),
}


@pytest.mark.parametrize("sharing", [True, False], ids=["shared", "unshared"])
@pytest.mark.parametrize("family", NOISY)
def test_two_forwards_in_training_mode_agree_whatever_noise_the_config_asks_for(family, sharing):
    """To the bit: the reference of a policy is the same forward, and its loss at step 0 must be ln 2."""
    name, sizes = NOISY[family]
    torch.manual_seed(0)
    stock = sharpened(getattr(transformers, f"{name}Config")(**sizes))
    if sharing and sharing_obstacle(split_causal_lm(stock)[0]):
        pytest.skip("cannot share")
    model = hybrid_of(stock, sharing=sharing).train()
    layout = lay_out(token_groups(SHAPES))
    with torch.no_grad():
        outputs = [model(layout) for _ in range(3)]
    for other in outputs[1:]:
        assert torch.equal(outputs[0].rewards, other.rewards)
        assert torch.equal(outputs[0].logps, other.logps)


LINEAR = {
    **GROUPED,
    "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
}
RECURRENT = (
    "(linear_attention|mamba|recurrent|AttentionInterface)"  # as versions of transformers name it
)
UNSHAREABLE = {
    "bloom": ("BloomConfig", BLOOM, "AttentionInterface"),
    "falcon-alibi": ("FalconConfig", {**FALCON, "alibi": True}, "ALiBi"),
    "mamba": (
        "MambaConfig",
        {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
        RECURRENT,
    ),
    "qwen3.5": ("Qwen3_5TextConfig", LINEAR, "linear_attention"),
    "nemotron": ("NemotronConfig", GROUPED, "no layout"),
    "gpt-oss": (
        "GptOssConfig",
        {**GROUPED, "num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8},
        "attention sinks",
    ),
    "lfm2": ("Lfm2Config", {**GROUPED, "layer_types": ["conv", "full_attention"]}, "conv"),
    "recurrent-gemma": (
        "RecurrentGemmaConfig",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "lru_width": 32,
            "attention_window_size": 7,
            "logits_soft_cap": 5.0,
        },
        RECURRENT,
    ),
}


def stock_of(name: str, sizes: dict[str, Any]) -> PreTrainedModel:
    config = getattr(transformers, name, None)
    if config is None:
        pytest.skip(f"this transformers has no {name}")
    torch.manual_seed(0)
    return sharpened(config(**sizes))


@pytest.mark.parametrize("family", UNSHAREABLE)
def test_a_model_that_cannot_share_is_refused_left_as_it_was_and_scores_unshared(family):
    """Right padding must not reach a recurrent state, nor shift an ALiBi bias; the log-probs are those
    of the stock model's logits, soft-capping included."""
    name, sizes, reason = UNSHAREABLE[family]
    stock = stock_of(name, sizes)
    before = stock.base_model.config._attn_implementation
    with pytest.raises(ModelError, match=rf"cannot share.*{reason}.*training\.sharing: off"):
        hybrid_of(stock)
    assert stock.base_model.config._attn_implementation == before
    groups = token_groups(SHAPES)
    model = hybrid_of(stock, sharing=False)
    expected = one_at_a_time(stock, model.reward_head, groups)
    with torch.no_grad():
        assert_close(model(lay_out(groups)), *expected)


OTHER_HEADS = {
    "hyperclovax": ("HyperCLOVAXConfig", {**GROUPED, "logits_scaling": 4.0}),
    "recurrent-gemma": UNSHAREABLE["recurrent-gemma"][:2],
    "modernbert-decoder": (
        "ModernBertDecoderConfig",
        {**SIZES, "cls_token_id": 1, "sep_token_id": 2},
    ),
}


@pytest.mark.parametrize("family", OTHER_HEADS)
def test_a_head_that_is_not_a_plain_product_is_honoured_or_refused(family):
    """HyperCLOVA X multiplies by logits_scaling, RecurrentGemma caps with logits_soft_cap, ModernBERT
    puts a dense layer and a norm before its decoder: a log-prob of another model is not acceptable."""
    stock = stock_of(*OTHER_HEADS[family])
    groups = token_groups(SHAPES)
    try:
        model = hybrid_of(stock, sharing=False)
        found = model(lay_out(groups))
    except ModelError:
        return
    assert_close(found, *one_at_a_time(stock, model.reward_head, groups))


def test_sharing_can_be_switched_off_and_on_and_off():
    model, layout = tiny_hybrid("llama"), lay_out(token_groups(SHAPES))
    shared = model(layout)
    stock = tiny_causal_lm("llama").config._attn_implementation
    for sharing in (False, True, False):
        model.share(sharing)
        expected = SHARED_PREFIX if sharing else stock
        assert model.backbone.config._attn_implementation == expected
        assert_close(model(layout), shared.rewards, shared.logps)


def test_a_model_whose_backbone_shares_already_can_be_split_and_wrapped_again():
    """A policy, then a reward model over the same backbone: the second must not take the first one's
    attention for the stock one."""
    model, layout = tiny_causal_lm("llama"), lay_out(token_groups(SHAPES))
    backbone, head = split_causal_lm(model)
    expected = HybridModel(backbone, policy_head=head)(layout).logps
    assert split_causal_lm(model) == (backbone, head)
    again = HybridModel(backbone, policy_head=head, sharing=False)
    assert_close(again(layout), None, expected)


@pytest.mark.parametrize(
    ("family", "name"), [("gpt2", "activation_function"), ("phi", "hidden_act")]
)
def test_a_gelu_of_nine_operations_is_replaced_by_the_fused_one(family, name):
    """Log-probs agree with the stock model's to 1e-5; the config, which is exported, names its own."""
    causal = tiny_causal_lm(family)
    assert any(isinstance(module, NewGELUActivation) for module in causal.modules())
    layout = lay_out(token_groups(SHAPES))
    padded = unshare(layout)
    logits = causal(input_ids=padded.input_ids, attention_mask=padded.attention_mask).logits
    stock = logits.flatten(0, 1)[padded.predictor].log_softmax(-1)
    model = hybrid_of(causal)
    assert not any(isinstance(module, NewGELUActivation) for module in causal.modules())
    expected = stock.gather(1, layout.targets[:, None])[:, 0]
    torch.testing.assert_close(model.tokens(layout).logps, expected, atol=1e-5, rtol=1e-5)
    assert getattr(causal.config, name) == "gelu_new"


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
}


def test_a_model_whose_rotary_factors_follow_the_longest_sequence_is_limited_to_those_that_keep_them():
    """Of 128 positions, longrope changes the factors of a whole row from 64 tokens on."""
    limited = transformers.Phi3Config(
        original_max_position_embeddings=64,
        max_position_embeddings=128,
        hidden_size=32,
        num_attention_heads=4,
        rope_parameters=LONGROPE,
    )
    assert longest_sequence(limited) == 64
    assert longest_sequence(tiny_causal_lm("llama").config) == 128
    assert longest_sequence(transformers.MambaConfig()) is None


def causal_over_the_row(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """What a model does that ignores the layout: every token sees all before it."""
    output = F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling, enable_gqa=True
    )
    return output.transpose(1, 2).contiguous(), None


def ignore_restarts(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    """Positions counted through the whole row."""
    if "branch_layout" in kwargs:
        tokens = kwargs["input_ids"].shape[1]
        kwargs = {**kwargs, "position_ids": torch.arange(tokens)[None]}
    return args, kwargs


@pytest.fixture
def layout() -> Layout:
    return lay_out(token_groups(SHAPES))


def test_the_check_passes_and_leaves_the_model_sharing_with_a_wider_tolerance_in_half(layout):
    """Half precision rounds in proportion: states a hundred times as large differ a hundred times as much,
    though nothing is wrong."""
    model = tiny_hybrid("llama")
    assert 0.0 < self_check(model, layout) < 1e-4
    assert model.sharing
    assert model.backbone.config._attn_implementation == SHARED_PREFIX
    assert all(parameter.grad is None for parameter in model.parameters())
    half = hybrid_of(tiny_causal_lm("llama").bfloat16())
    assert self_check(half, layout) > 1e-3
    with torch.autocast("cpu", torch.bfloat16):
        for scale in (1.0, 100.0):
            model.backbone.norm.weight.data.fill_(scale)
            assert 1e-3 < self_check(model, layout) < 0.05
    assert self_check(tiny_hybrid("llama", sharing=False), layout) == 0.0


def test_the_check_catches_attention_that_ignores_the_layout(layout, monkeypatch):
    model = tiny_hybrid("llama")
    monkeypatch.setitem(AttentionInterface._global_mapping, SHARED_PREFIX, causal_over_the_row)
    with pytest.raises(NumericsError, match=r"hidden states differ by .*training\.sharing: off"):
        self_check(model, layout)
    assert model.sharing


@pytest.mark.parametrize("family", ["llama", "gpt2"], ids=["rotary", "learned positions"])
def test_the_check_catches_position_restarts_that_are_ignored(family, layout):
    model = tiny_hybrid(family)
    model.backbone.register_forward_pre_hook(ignore_restarts, with_kwargs=True)
    with pytest.raises(NumericsError, match="Its layers cannot share a prefix"):
        self_check(model, layout)


def test_the_check_catches_a_sliding_window_that_is_ignored(layout, monkeypatch):
    shared = AttentionInterface._global_mapping[SHARED_PREFIX]

    def without_window(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return shared(nn.Module(), *args, **{**kwargs, "sliding_window": None})

    model = tiny_hybrid("mistral")
    monkeypatch.setitem(AttentionInterface._global_mapping, SHARED_PREFIX, without_window)
    with pytest.raises(NumericsError):
        self_check(model, layout)


@pytest.mark.parametrize("part", ["backbone.norm", "policy_head"])
def test_the_check_catches_what_is_no_number(part, layout):
    model = tiny_hybrid("llama")
    model.get_submodule(part).weight.data.view(-1)[0] = float("nan")
    with pytest.raises(NumericsError):
        self_check(model, layout)
