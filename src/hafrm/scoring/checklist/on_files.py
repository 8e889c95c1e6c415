"""Clauses on what lies in the directory: config, weights files, and nothing else that would be run."""

import inspect
from collections import Counter
from collections.abc import Iterator

from hafrm.scoring.checklist.clause import Finding
from hafrm.scoring.checklist.subject import Subject
from hafrm.scoring.older_readers import old_rotary_keys

_SUFFIX = "ForSequenceClassification"
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
"""Number formats as safetensors and as a config write them."""
_HEAD = "score.weight"
_OLD_DEFAULTS = {"rope_theta": 10000.0}
"""What version 4 takes where nothing is said, for most classes."""


def architecture(subject: Subject) -> Finding:
    """A stock sequence classifier by name: other names are other tasks to servers.

    vLLM turns `...ForRewardModel` into an embedding model; a reward model saved as `...ForCausalLM` gets
    a fresh head from whoever loads it (reward-bench#210).
    """
    names = subject.config.get("architectures") or []
    right = len(names) == 1 and str(names[0]).endswith(_SUFFIX)
    return Finding(right, f"architectures {names}")


def one_label(subject: Subject) -> Finding:
    """`id2label` has one entry: num_labels is not stored, and its default is two (OpenRLHF#1039)."""
    labels = subject.config.get("id2label")
    if labels is None:
        return Finding(False, "no id2label: whoever loads it builds two labels")
    return Finding(len(labels) == 1, f"id2label {labels}")


def raw_reward(subject: Subject) -> Finding:
    """`problem_type: regression`, or pipelines and vLLM give the reward's sigmoid (vllm#20807)."""
    kind = subject.config.get("problem_type")
    return Finding(kind == "regression", f"problem_type {kind!r}")


def stock_code(subject: Subject) -> Finding:
    """No code of its own: an `auto_map` asks for trust_remote_code, and some servers run it unasked."""
    maps = {
        "config.json": subject.config.get("auto_map"),
        "tokenizer_config.json": subject.tokenizer_config.get("auto_map"),
    }
    found = [f"auto_map in {name}" for name, value in maps.items() if value]
    found += sorted(file.name for file in subject.path.rglob("*.py"))
    return Finding(not found, ", ".join(found) or "no auto_map and no Python files")


def safetensors_only(subject: Subject) -> Finding:
    """Weights in safetensors and no pickle beside them, which runs code when it is loaded."""
    pickles = sorted(f.name for f in subject.path.rglob("*") if f.suffix in _PICKLES)
    if pickles:
        return Finding(False, f"pickles: {', '.join(pickles)}")
    if not subject.weights:
        return Finding(False, "no safetensors file")
    return Finding(True, f"{len(subject.weights)} tensors in safetensors")


def not_quantised(subject: Subject) -> Finding:
    """No `quantization_config` left over from the base model: whoever loads it would quantise again."""
    left = subject.config.get("quantization_config")
    return Finding(not left, "none" if not left else f"quantization_config {left}")


def head_without_bias(subject: Subject) -> Finding:
    """One row `score.weight` of the model's width, no bias: vLLM and SGLang have no place for one."""
    others = sorted(_other_heads(subject))
    if others:
        return Finding(False, f"holds {', '.join(others)}")
    if _HEAD not in subject.weights:
        return Finding(False, f"the files hold no {_HEAD}: whoever loads it makes one up at random")
    shape, width = subject.weights[_HEAD].shape, subject.text_config.get("hidden_size")
    right = len(shape) == 2 and shape[0] == 1 and width in (None, shape[1])
    return Finding(right, f"{_HEAD} {list(shape)}")


def dtype_stated(subject: Subject) -> Finding:
    """The config names the dtype that the weights are stored in; the head may be finer."""
    stated = subject.config.get("dtype") or subject.config.get("torch_dtype")
    backbone = [t.dtype for name, t in subject.weights.items() if not name.startswith("score.")]
    stored = Counter(_STORED.get(dtype, dtype) for dtype in backbone).most_common(1)
    kind = stored[0][0] if stored else None
    if stated is None:
        return Finding(False, f"no dtype in config.json; the weights are {kind}")
    return Finding(stated == kind, f"{stated} stated, {kind} stored")


def rotary_keys(subject: Subject) -> Finding:
    """Rotary settings under version 4's names too, or its readers rotate otherwise (vllm#42624)."""
    for config in (subject.config, subject.text_config):
        for key, value in old_rotary_keys(config).items():
            theirs = config.get(key, _OLD_DEFAULTS.get(key))
            if theirs != value:
                return Finding(False, f"{key} is {value}, and {theirs} for older readers")
    return Finding(True, "old and new readers rotate alike")


def no_fresh_weights(subject: Subject) -> Finding:
    """Plain transformers finds every weight in the files, so that none is made up (ms-swift#6129)."""
    model, info = subject.loaded
    missing = sorted(info["missing_keys"]) + sorted(str(k) for k in info.get("mismatched_keys", ()))
    found = f"freshly initialised: {', '.join(missing[:4])}"
    return Finding(not missing, found if missing else f"{type(model).__name__}, whole")


def inputs_fit(subject: Subject) -> Finding:
    """Whoever passes on all that the tokenizer gives is taken: decoders refuse token_type_ids."""
    taken = set(inspect.signature(type(subject.loaded[0]).forward).parameters)
    given = set(subject.tokenizer("a"))
    surplus = sorted(given - taken)
    found = f"the tokenizer gives {', '.join(surplus or sorted(given))}"
    return Finding(not surplus, f"{found}, which the model does not take" if surplus else found)


def nothing_left_over(subject: Subject) -> Finding:
    """No weights that the class has no place for: vLLM refuses a file with an LM head (vllm#21176)."""
    surplus = sorted(subject.loaded[1]["unexpected_keys"])
    return Finding(not surplus, f"surplus: {', '.join(surplus[:4])}" if surplus else "none")


def _other_heads(subject: Subject) -> Iterator[str]:
    for name in subject.weights:
        if name.startswith(("v_head.", "value_head.", "classifier.")) or name == "score.bias":
            yield name
    if (subject.path / "value_head.safetensors").is_file():
        yield "value_head.safetensors"
