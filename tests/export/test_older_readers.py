"""What transformers 4 reads of an export is what transformers 5 reads; golden values from both schemas."""

import json

import pytest
from transformers import AutoConfig, AutoTokenizer

from hafrm.export.plain_model import old_config, old_rotary_keys, old_tokenizer
from support.exports import export_both

DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}
SCALING = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LINEAR = {"rope_type": "linear", "factor": 8.0}
NEOX = {"partial_rotary_factor": 0.25}
# Gemma 3 has another base for local layers
GEMMA = {"full_attention": LINEAR | {"rope_theta": 1e6}, "sliding_attention": DEFAULT}


@pytest.mark.parametrize(
    ("family", "rope", "expected"),
    [
        ("gpt2", None, {}),
        ("llama", DEFAULT, {"rope_theta": 1e4}),
        ("llama3", SCALING | {"rope_theta": 5e5}, {"rope_theta": 5e5, "rope_scaling": SCALING}),
        ("gpt_neox", DEFAULT | NEOX, {"rotary_emb_base": 1e4, "rotary_pct": 0.25}),
        (
            "gemma3",
            GEMMA,
            {"rope_theta": 1e6, "rope_scaling": LINEAR, "rope_local_base_freq": 1e4},
        ),
    ],
)
def test_rotary_settings_stand_under_their_old_names_too(family, rope, expected):
    assert old_rotary_keys({"rope_parameters": rope, "model_type": family}) == expected


def test_nested_configs_and_the_dtype_are_amended_and_what_is_said_already_stays():
    nested = {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}
    amended = old_config({"text_config": nested, "dtype": "bfloat16", "torch_dtype": "float32"})
    assert amended["text_config"]["rope_theta"] == 5.0
    assert amended["torch_dtype"] == "float32"
    assert old_config({"dtype": "bfloat16"})["torch_dtype"] == "bfloat16"


def test_the_tokenizer_is_of_a_class_that_both_have_and_keeps_its_extra_tokens():
    new = {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<a>"]}
    assert old_tokenizer(new) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "additional_special_tokens": ["<a>"],
    }
    own = {"tokenizer_class": "Qwen2Tokenizer"}
    assert old_tokenizer(own) == own


@pytest.mark.parametrize("family", ["llama", "phi", "gpt-neox", "gemma3", "gpt2"])
def test_the_version_at_hand_reads_an_amended_export_as_before(tmp_path, family):
    """Rotary parameters, ids and special tokens as they were in memory."""
    model, encoder = export_both(tmp_path, family)
    before, theirs = model.backbone.config, encoder.tokenizer
    for head in ("reward", "policy"):
        config = AutoConfig.from_pretrained(tmp_path / head)
        assert getattr(config, "rope_parameters", None) == getattr(before, "rope_parameters", None)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / head)
        text = "<|im_start|>user\nHow do I bake <think>bread</think>?<|im_end|>"
        assert tokenizer(text)["input_ids"] == theirs(text)["input_ids"]
        assert set(tokenizer.all_special_tokens) == set(theirs.all_special_tokens)
        raw = json.loads((tmp_path / head / "tokenizer_config.json").read_text())
        assert raw["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert not raw["add_bos_token"]
