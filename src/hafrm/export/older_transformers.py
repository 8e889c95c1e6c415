"""Exports for transformers 4: its keys in config.json and tokenizer_config.json beside version 5's.

Version 5 moved rotary settings into `rope_parameters`, which version 4 ignores: it computes with its
class's default base without a warning (vllm-project/vllm#42624). Version 5 reads both.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_GPT_NEOX = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
"""transformers 4's own names in GPT-NeoX configs."""


def write_for_older_readers(directory: Path) -> None:
    """Add version 4's keys to config.json and tokenizer_config.json of an exported directory."""
    for name, convert in (("config.json", old_config), ("tokenizer_config.json", old_tokenizer)):
        file = directory / name
        if file.is_file():
            content = convert(json.loads(file.read_bytes()))
            text = json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True)
            file.write_text(text + "\n", encoding="utf-8")


def old_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with version 4's names for rotary settings and dtype beside 5's, nested configs too."""
    result = {
        key: old_config(value) if key.endswith("_config") and isinstance(value, Mapping) else value
        for key, value in config.items()
    }
    dtype = {"torch_dtype": config["dtype"]} if "dtype" in config else {}
    return old_rotary_keys(config) | dtype | result


def old_rotary_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Version 4's keys for `rope_parameters`; empty without them."""
    rope = config.get("rope_parameters")
    if not isinstance(rope, Mapping):
        return {}
    local = rope.get("sliding_attention")
    rope = rope.get("full_attention", rope)  # Gemma 3 has another base for local layers
    keys = {k: rope[k] for k in ("rope_theta", "partial_rotary_factor") if k in rope}
    scaling = {key: value for key, value in rope.items() if key not in keys}
    if scaling.get("rope_type") != "default":
        keys["rope_scaling"] = scaling
    if local:
        keys["rope_local_base_freq"] = local["rope_theta"]
    names = _GPT_NEOX if config.get("model_type") == "gpt_neox" else {}
    return {names.get(key, key): value for key, value in keys.items()}


def old_tokenizer(config: Mapping[str, Any]) -> dict[str, Any]:
    """The tokenizer's config with a class that both versions have, and extra tokens under the old key."""
    result = dict(config)
    if result.get("tokenizer_class") == "TokenizersBackend":
        result["tokenizer_class"] = "PreTrainedTokenizerFast"
        # or version 4's class adds token_type_ids, which decoders refuse
        result.setdefault("model_input_names", ["input_ids", "attention_mask"])
    if isinstance(result.get("extra_special_tokens"), list):
        # not under both keys: version 5 would then drop them (huggingface/transformers#47838)
        result["additional_special_tokens"] = result.pop("extra_special_tokens")
    return result
