"""Exports that transformers 4 reads as transformers 5 does: two files amended after they were saved.

Version 5 moved the rotary settings into `rope_parameters`, which version 4 (and servers and benchmarks
pinned to it) passes over: it computes with its class's default base, without a word
(vllm-project/vllm#42624). And it names a tokenizer class that version 4 does not have. The old keys are
written beside the new ones; version 5 reads both alike.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_GPT_NEOX = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
"""Its own old names."""


def write_for_older_readers(directory: Path) -> None:
    """Amend config.json and tokenizer_config.json of an exported directory, where they are."""
    for name, amended in (("config.json", old_config), ("tokenizer_config.json", old_tokenizer)):
        file = directory / name
        if file.is_file():
            content = amended(json.loads(file.read_bytes()))
            text = json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True)
            file.write_text(text + "\n", encoding="utf-8")


def old_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with version 4's names for rotary settings and dtype beside 5's, nested configs too."""
    amended = {
        key: old_config(value) if key.endswith("_config") and isinstance(value, Mapping) else value
        for key, value in config.items()
    }
    dtype = {"torch_dtype": config["dtype"]} if "dtype" in config else {}
    return old_rotary_keys(config) | dtype | amended


def old_rotary_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """What version 4 needs to rotate as `rope_parameters` says; nothing where there are none."""
    known = config.get("rope_parameters")
    if not isinstance(known, Mapping):
        return {}
    full, local = known.get("full_attention"), known.get("sliding_attention")
    if isinstance(full, Mapping):  # Gemma 3: a base of its own for local layers
        keys = _flat(full)
        return keys | ({"rope_local_base_freq": local["rope_theta"]} if local else {})
    keys = _flat(known)
    if config.get("model_type") == "gpt_neox":
        return {_GPT_NEOX.get(key, key): value for key, value in keys.items()}
    return keys


def _flat(known: Mapping[str, Any]) -> dict[str, Any]:
    keys = {k: known[k] for k in ("rope_theta", "partial_rotary_factor") if k in known}
    scaling = {key: value for key, value in known.items() if key not in keys}
    return keys | ({"rope_scaling": scaling} if scaling.get("rope_type") != "default" else {})


def old_tokenizer(config: Mapping[str, Any]) -> dict[str, Any]:
    """The tokenizer's config under the class name that both versions have, extra tokens under the old key.

    Not under both: version 5 would then drop them (huggingface/transformers#47838). What the class gives
    is said, because version 4's adds token_type_ids, which decoders refuse.
    """
    amended = dict(config)
    if amended.get("tokenizer_class") == "TokenizersBackend":
        amended["tokenizer_class"] = "PreTrainedTokenizerFast"
        amended.setdefault("model_input_names", ["input_ids", "attention_mask"])
    extra = amended.get("extra_special_tokens")
    if isinstance(extra, list):
        del amended["extra_special_tokens"]
        amended["additional_special_tokens"] = extra
    return amended
