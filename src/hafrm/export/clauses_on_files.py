"""Clauses on the files of a directory: config, weights, and no code that would be run."""

import inspect
from collections import Counter
from collections.abc import Iterator

from hafrm.export.older_transformers import old_rotary_keys
from hafrm.export.plain_model import Finding, PlainModel

_SUFFIX = "ForSequenceClassification"
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
"""Number formats as safetensors and as a config write them."""
_HEAD = "score.weight"
_OLD_DEFAULTS = {"rope_theta": 10000.0}
"""What version 4 takes where nothing is said, for most classes."""


def architecture(plain: PlainModel) -> Finding:
    """A stock sequence classifier by name: other names are other tasks to servers.

    vLLM turns `...ForRewardModel` into an embedding model; a reward model saved as `...ForCausalLM` is
    loaded with a random head (reward-bench#210).
    """
    names = plain.config.get("architectures") or []
    right = len(names) == 1 and str(names[0]).endswith(_SUFFIX)
    return Finding(right, f"architectures {names}")


def one_label(plain: PlainModel) -> Finding:
    """`id2label` has one entry: num_labels is not stored, and its default is two (OpenRLHF#1039)."""
    labels = plain.config.get("id2label")
    if labels is None:
        return Finding(False, "no id2label: loaders build two labels")
    return Finding(len(labels) == 1, f"id2label {labels}")


def raw_reward(plain: PlainModel) -> Finding:
    """`problem_type: regression`, or pipelines and vLLM give the reward's sigmoid (vllm#20807)."""
    kind = plain.config.get("problem_type")
    return Finding(kind == "regression", f"problem_type {kind!r}")


def stock_code(plain: PlainModel) -> Finding:
    """No code of its own: an `auto_map` asks for trust_remote_code, and some servers run it unasked."""
    maps = {
        "config.json": plain.config.get("auto_map"),
        "tokenizer_config.json": plain.tokenizer_config.get("auto_map"),
    }
    code = [f"auto_map in {name}" for name, value in maps.items() if value]
    code += sorted(file.name for file in plain.path.rglob("*.py"))
    return Finding(not code, ", ".join(code) or "no auto_map and no Python files")


def safetensors_only(plain: PlainModel) -> Finding:
    """Weights in safetensors and no pickle beside them, which runs code when it is loaded."""
    pickles = sorted(f.name for f in plain.path.rglob("*") if f.suffix in _PICKLES)
    if pickles:
        return Finding(False, f"pickles: {', '.join(pickles)}")
    if not plain.weights:
        return Finding(False, "no safetensors file")
    return Finding(True, f"{len(plain.weights)} tensors in safetensors")


def not_quantised(plain: PlainModel) -> Finding:
    """No `quantization_config` left over from the base model: loaders would quantise again."""
    left = plain.config.get("quantization_config")
    return Finding(not left, "none" if not left else f"quantization_config {left}")


def head_without_bias(plain: PlainModel) -> Finding:
    """One row `score.weight` of the model's width, no bias: vLLM and SGLang have no place for one."""
    others = sorted(_other_heads(plain))
    if others:
        return Finding(False, f"holds {', '.join(others)}")
    if _HEAD not in plain.weights:
        return Finding(False, f"the files hold no {_HEAD}: loaders initialise one at random")
    shape, width = plain.weights[_HEAD].shape, plain.text_config.get("hidden_size")
    right = len(shape) == 2 and shape[0] == 1 and width in (None, shape[1])
    return Finding(right, f"{_HEAD} {list(shape)}")


def dtype_stated(plain: PlainModel) -> Finding:
    """The config names the dtype of the stored weights; the head may be more precise."""
    stated = plain.config.get("dtype") or plain.config.get("torch_dtype")
    backbone = [t.dtype for name, t in plain.weights.items() if not name.startswith("score.")]
    stored = Counter(_STORED.get(dtype, dtype) for dtype in backbone).most_common(1)
    kind = stored[0][0] if stored else None
    if stated is None:
        return Finding(False, f"no dtype in config.json; the weights are {kind}")
    return Finding(stated == kind, f"{stated} stated, {kind} stored")


def rotary_keys(plain: PlainModel) -> Finding:
    """Rotary settings under version 4's names too, or it uses other frequencies (vllm#42624)."""
    for config in (plain.config, plain.text_config):
        for key, value in old_rotary_keys(config).items():
            theirs = config.get(key, _OLD_DEFAULTS.get(key))
            if theirs != value:
                return Finding(False, f"{key} is {value}, but {theirs} for transformers 4")
    return Finding(True, "transformers 4 and 5 rotate alike")


def no_fresh_weights(plain: PlainModel) -> Finding:
    """Plain transformers finds every weight in the files, so that none is random (ms-swift#6129)."""
    model, info = plain.loaded
    missing = sorted(info["missing_keys"]) + sorted(str(k) for k in info.get("mismatched_keys", ()))
    observed = f"freshly initialised: {', '.join(missing[:4])}"
    return Finding(not missing, observed if missing else f"{type(model).__name__}, complete")


def inputs_fit(plain: PlainModel) -> Finding:
    """The model takes everything that the tokenizer returns: decoders refuse token_type_ids."""
    taken = set(inspect.signature(type(plain.loaded[0]).forward).parameters)
    returned = set(plain.tokenizer("a"))
    surplus = sorted(returned - taken)
    observed = f"the tokenizer gives {', '.join(surplus or sorted(returned))}"
    return Finding(not surplus, observed + (", which the model refuses" if surplus else ""))


def nothing_left_over(plain: PlainModel) -> Finding:
    """No weights that the class has no place for: vLLM refuses a file with an LM head (vllm#21176)."""
    surplus = sorted(plain.loaded[1]["unexpected_keys"])
    return Finding(not surplus, f"surplus: {', '.join(surplus[:4])}" if surplus else "none")


def _other_heads(plain: PlainModel) -> Iterator[str]:
    for name in plain.weights:
        if name.startswith(("v_head.", "value_head.", "classifier.")) or name == "score.bias":
            yield name
    if (plain.path / "value_head.safetensors").is_file():
        yield "value_head.safetensors"
