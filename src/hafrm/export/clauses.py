"""The clauses of the checklist: what a reward directory needs so that every consumer gets its scores.

A clause is one function on a `PlainModel` under `@clause`, which adds it to `CLAUSES`, in the order of
checking: first files, then tokenizer and template, then the rewards that plain transformers computes.
"""

import inspect
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch

from hafrm.export.older_transformers import old_rotary_keys
from hafrm.export.plain_model import PROBES, Finding, PlainModel, largest_difference

Check = Callable[[PlainModel], Finding]

_STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
"""Number formats as safetensors and as a config write them."""
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_HEAD = "score.weight"


@dataclass(frozen=True)
class Clause:
    """One thing that a reward directory must fulfil."""

    name: str
    check: Check
    fix: str
    """What to do if it does not hold."""
    needs: tuple[str, ...]
    """Clauses that must hold before this one can be checked."""


CLAUSES: list[Clause] = []
"""In the order of checking: a clause comes after those that it needs."""


def clause(name: str, *needs: str, fix: str) -> Callable[[Check], Check]:
    """Add the decorated function to `CLAUSES`."""

    def add(check: Check) -> Check:
        CLAUSES.append(Clause(name, check, fix, needs))
        return check

    return add


@clause(
    "sequence classifier",
    fix="save it by AutoModelForSequenceClassification, or re-export it (hafrm export)",
)
def sequence_classifier(plain: PlainModel) -> Finding:
    """A stock sequence classifier by name: other names are other tasks to servers."""
    # vLLM turns ...ForRewardModel into an embedding model; a reward model saved as ...ForCausalLM is
    # loaded with a random head (reward-bench#210)
    names = plain.config.get("architectures") or []
    right = len(names) == 1 and str(names[0]).endswith("ForSequenceClassification")
    return Finding(right, f"architectures {names}")


@clause(
    "one label",
    "sequence classifier",
    fix='write "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0} into config.json',
)
def one_label(plain: PlainModel) -> Finding:
    """`id2label` has one entry: num_labels is not stored, and its default is two (OpenRLHF#1039)."""
    labels = plain.config.get("id2label") or {}  # without it loaders build two
    return Finding(len(labels) == 1, f"id2label {labels}")


@clause(
    "raw reward", "sequence classifier", fix='write "problem_type": "regression" into config.json'
)
def raw_reward(plain: PlainModel) -> Finding:
    """`problem_type: regression`, or pipelines and vLLM give the reward's sigmoid (vllm#20807)."""
    kind = plain.config.get("problem_type")
    return Finding(kind == "regression", f"problem_type {kind!r}")


@clause(
    "stock code", fix="remove auto_map and the Python files; the class must be one of transformers"
)
def stock_code(plain: PlainModel) -> Finding:
    """No code of its own: an `auto_map` asks for trust_remote_code, and some servers run it unasked."""
    configs = {"config.json": plain.config, "tokenizer_config.json": plain.tokenizer_config}
    code = [f"auto_map in {name}" for name, config in configs.items() if config.get("auto_map")]
    code += sorted(file.name for file in plain.path.rglob("*.py"))
    return Finding(not code, ", ".join(code) or "no auto_map and no Python files")


@clause("safetensors only", fix="save the weights with safetensors and delete the pickles")
def safetensors_only(plain: PlainModel) -> Finding:
    """Weights in safetensors and no pickle beside them, which runs code when it is loaded."""
    pickles = sorted(f.name for f in plain.path.rglob("*") if f.suffix in _PICKLES)
    if pickles:
        return Finding(False, f"pickles: {', '.join(pickles)}")
    return Finding(bool(plain.weights), f"{len(plain.weights)} tensors in safetensors")


@clause(
    "not quantised",
    fix="remove quantization_config from config.json, once the weights are dequantised",
)
def not_quantised(plain: PlainModel) -> Finding:
    """No `quantization_config` left over from the base model: loaders would quantise again."""
    left = plain.config.get("quantization_config")
    return Finding(not left, f"quantization_config {left}")


@clause(
    "head without bias",
    "sequence classifier",
    "safetensors only",
    fix="keep one row score.weight; a bias shifts all rewards equally, so it can be dropped; after LoRA, "
    'train with modules_to_save=["score"] and merge',
)
def head_without_bias(plain: PlainModel) -> Finding:
    """One row `score.weight` of the model's width, no bias: vLLM and SGLang have no place for one."""
    heads = ("v_head.", "value_head.", "classifier.", "score.bias")
    others = sorted(name for name in plain.weights if name.startswith(heads))
    if (plain.path / "value_head.safetensors").is_file():
        others.append("value_head.safetensors")
    if others:
        return Finding(False, f"holds {', '.join(others)}")
    if _HEAD not in plain.weights:
        return Finding(False, f"the files hold no {_HEAD}: loaders initialise one at random")
    shape, width = plain.weights[_HEAD].shape, plain.text_config.get("hidden_size")
    right = len(shape) == 2 and shape[0] == 1 and width in (None, shape[1])
    return Finding(right, f"{_HEAD} {list(shape)}")


@clause("dtype stated", "safetensors only", fix='write the weights\' own "dtype" into config.json')
def dtype_stated(plain: PlainModel) -> Finding:
    """The config names the dtype of the stored weights; the head may be more precise."""
    stated = plain.config.get("dtype") or plain.config.get("torch_dtype")
    backbone = [t.dtype for name, t in plain.weights.items() if not name.startswith("score.")]
    stored = Counter(_STORED.get(dtype, dtype) for dtype in backbone).most_common(1)
    kind = stored[0][0] if stored else None
    return Finding(stated == kind is not None, f"{stated} stated, {kind} stored")


@clause(
    "rotary settings",
    fix="write rope_theta (rope_scaling, partial_rotary_factor) into config.json beside rope_parameters",
)
def rotary_settings(plain: PlainModel) -> Finding:
    """Rotary settings under version 4's names too, or it uses other frequencies (vllm#42624)."""
    for config in (plain.config, plain.text_config):
        for key, value in old_rotary_keys(config).items():
            # 10,000 is what version 4 takes where nothing is said, for most classes
            theirs = config.get(key, 10000.0 if key == "rope_theta" else None)
            if theirs != value:
                return Finding(False, f"{key} is {value}, but {theirs} for transformers 4")
    return Finding(True, "transformers 4 and 5 rotate alike")


@clause(
    "no fresh weights",
    *("sequence classifier", "one label", "stock code"),
    *("safetensors only", "not quantised", "head without bias"),
    fix="export again from the trained model: a copy or merge has lost weights",
)
def no_fresh_weights(plain: PlainModel) -> Finding:
    """Plain transformers finds every weight in the files, so that none is random (ms-swift#6129)."""
    model, info = plain.loaded
    missing = sorted(info["missing_keys"]) + sorted(str(k) for k in info.get("mismatched_keys", ()))
    observed = f"freshly initialised: {', '.join(missing[:4])}"
    return Finding(not missing, observed if missing else f"{type(model).__name__}, complete")


@clause(
    "nothing left over",
    "no fresh weights",
    fix="save the classifier's own weights only; the LM head belongs in its own directory",
)
def nothing_left_over(plain: PlainModel) -> Finding:
    """No weights that the class has no place for: vLLM refuses a file with an LM head (vllm#21176)."""
    surplus = sorted(plain.loaded[1]["unexpected_keys"])
    return Finding(not surplus, f"surplus: {', '.join(surplus[:4]) or 'none'}")


@clause(
    "chat template",
    fix="set tokenizer.chat_template to the format that was trained on, and save the tokenizer here",
)
def chat_template(plain: PlainModel) -> Finding:
    """The tokenizer loads, and its template writes every turn of a conversation."""
    if not plain.tokenizer.chat_template:
        return Finding(False, "the tokenizer has no chat template")
    turns = [(turn["content"], plain.render(probe)) for probe in PROBES for turn in probe]
    lost = [content for content, text in turns if content.strip() not in text]
    if lost:
        return Finding(False, f"the template leaves out {lost[0][:40]!r}")
    return Finding(True, f"{type(plain.tokenizer).__name__}, renders {len(PROBES)} conversations")


@clause(
    "no date in the template",
    "chat template",
    fix="replace strftime_now(...) in the template with a fixed date",
)
def no_date_in_template(plain: PlainModel) -> Finding:
    """Under two clocks the template writes the same text: a date in it changes rewards overnight."""
    template = str(plain.tokenizer.chat_template)
    # The macro hides the clock that transformers offers. 1 and 31 differ as text and as numbers.
    first, second = (
        plain.render(
            PROBES[0], f"{{% macro strftime_now(format) %}}{day}{{% endmacro %}}{template}"
        )
        for day in ("1", "31")
    )
    return Finding(first == second, "the same" if first == second else "the template writes a date")


@clause(
    "pad is not EOS",
    "chat template",
    fix="choose an unused token as pad, in the tokenizer and as pad_token_id in config.json",
)
def pad_is_not_eos(plain: PlainModel) -> Finding:
    """Config and tokenizer name one pad, which is no EOS: transformers skips trailing pads, servers do not.

    With pad = EOS transformers reads one token early (transformers#35352, RLHFlow#49).
    """
    pad, theirs = plain.text_config.get("pad_token_id"), plain.tokenizer.pad_token_id
    if pad is None:  # where a nested config leaves it to the outer one
        pad = plain.config.get("pad_token_id")
    ends = _ends(plain)
    right = pad is not None and pad == theirs and pad not in ends
    return Finding(right, f"pad {pad} in the config, {theirs} in the tokenizer; EOS {sorted(ends)}")


@clause(
    "ids have embeddings",
    "chat template",
    fix="save the tokenizer that the model was trained with, or resize the embeddings",
)
def ids_have_embeddings(plain: PlainModel) -> Finding:
    """The tokenizer has no more tokens than the model has embeddings."""
    tokens, size = len(plain.tokenizer), plain.text_config.get("vocab_size")
    return Finding(size is not None and tokens <= size, f"{tokens} tokens, {size} embeddings")


@clause(
    "BOS once",
    "chat template",
    fix='write "add_bos_token": false, "add_eos_token": false into tokenizer_config.json, or take the BOS '
    "out of the tokenizer's post-processor",
)
def bos_once(plain: PlainModel) -> Finding:
    """A rendered text gives the same ids with and without added special tokens (reward-bench#164)."""
    # Pipelines add them, TRL and OpenRLHF do not; where the template has written a BOS, a second one comes.
    for text in plain.texts:
        added, bare = (plain.ids(text, add_special_tokens=special) for special in (True, False))
        if added != bare:
            observed = f"the tokenizer adds ids: {added[:2]}... {added[-2:]}"
            return Finding(False, f"{observed}; BOS is {plain.tokenizer.bos_token_id}")
    return Finding(True, "no id is added to a rendered text")


@clause(
    "ends in EOS",
    "chat template",
    fix="make the template end an assistant's last turn at the EOS, with nothing after it",
)
def ends_in_eos(plain: PlainModel) -> Finding:
    """A rendered answer ends at an EOS, the one that was trained (TRL#5813, gpt-neox#1285)."""
    ends = _ends(plain)
    trained = {line.input_ids[-1] for line in plain.golden if line.input_ids}
    for probe in PROBES:
        text = plain.render(probe)
        last = plain.ids(text)[-1]
        if last not in ends:
            observed = f"it ends in {text[-24:]!r}; EOS is {plain.tokenizer.eos_token!r}"
            return Finding(False, observed)
        if trained and last not in trained:
            return Finding(False, f"it ends in id {last}, and training read at {sorted(trained)}")
    return Finding(True, f"it ends in {plain.tokenizer.convert_ids_to_tokens(last)!r}")


@clause(
    "inputs fit",
    "no fresh weights",
    "chat template",
    fix='write "model_input_names": ["input_ids", "attention_mask"] into tokenizer_config.json',
)
def inputs_fit(plain: PlainModel) -> Finding:
    """The model takes everything that the tokenizer returns: decoders refuse token_type_ids."""
    taken = set(inspect.signature(type(plain.loaded[0]).forward).parameters)
    returned = set(plain.tokenizer("a"))
    refused = f"; the model refuses {', '.join(sorted(returned - taken))}"
    observed = f"the tokenizer gives {', '.join(sorted(returned))}"
    return Finding(returned <= taken, observed + ("" if returned <= taken else refused))


@clause(
    "finite scores",
    *("no fresh weights", "chat template", "ids have embeddings"),
    fix="look for weights that are not finite; if the dtype is float16, export bfloat16 or float32 instead",
)
def finite_scores(plain: PlainModel) -> Finding:
    """Every reward is a number; float16 overflows where float32 did not (reward-bench runs float16)."""
    rewards = plain.alone
    bad = int((~torch.isfinite(rewards)).sum())
    low, high = float(rewards.min()), float(rewards.max())
    observed = f"{len(rewards)} rewards from {low:.4g} to {high:.4g}"
    return Finding(not bad, f"{bad} of {observed} are not finite" if bad else observed)


@clause(
    "last token",
    *("finite scores", "pad is not EOS"),
    fix="the class does not read the reward at the last token: use a stock decoder classifier",
)
def last_token(plain: PlainModel) -> Finding:
    """transformers reads at the literal last token, as vLLM and SGLang do (TRL#6952, TRL#3750)."""
    by_hand = torch.tensor([plain.score_by_hand(text) for text in plain.texts])
    return _within(plain, largest_difference(plain.alone, by_hand))


@clause(
    "left = right padding",
    *("finite scores", "pad is not EOS"),
    fix="the model attends to pads: pad on the right only, or use another attention implementation",
)
def left_is_right_padding(plain: PlainModel) -> Finding:
    """Padded left and padded right give the same rewards (TRL#937, reward-bench#137)."""
    right, left = plain.score(plain.texts, "right"), plain.score(plain.texts, "left")
    bare = plain.score(plain.texts, "left", positions=False)
    holds, observed = _within(plain, largest_difference(left, right))
    shift = largest_difference(bare, right)
    if holds and not shift <= plain.tolerance:
        observed += f"; left padding without position_ids is off by {shift:.2g}: pad right"
    return Finding(holds, observed)


@clause(
    "batch 1 = batch N",
    *("finite scores", "pad is not EOS"),
    fix="find what depends on the batch (normalisation, dropout, a kernel); score one at a time until then",
)
def batch_1_is_batch_n(plain: PlainModel) -> Finding:
    """A text gets the same reward alone and among others (reward-bench#137, NeMo-Aligner#439)."""
    return _within(plain, largest_difference(plain.score(plain.texts), plain.alone))


@clause(
    "golden scores",
    *("last token", "BOS once", "ends in EOS", "no date in the template"),
    fix="weights, tokenizer or template differ from the exported ones; export again",
)
def golden_scores(plain: PlainModel) -> Finding:
    """The recorded rewards come back, from the recorded ids."""
    if not plain.golden:
        return Finding(None, "the directory has no golden_scores.jsonl, and none was given")
    replay = plain.replay()
    if replay.faults:
        return Finding(False, replay.faults[0])
    holds, observed = _within(plain, replay.differences["alone"])
    return Finding(holds, f"{len(plain.golden)} replayed, {observed}")


def _ends(plain: PlainModel) -> set[int]:
    """Every id that the directory's files name as EOS."""
    ends = {plain.tokenizer.eos_token_id}
    for config in (plain.config, plain.text_config):
        eos = config.get("eos_token_id")
        ends |= set(eos) if isinstance(eos, list) else {eos}
    return {int(end) for end in ends if end is not None}


def _within(plain: PlainModel, difference: float) -> Finding:
    observed = f"largest difference {difference:.2g} (tolerated {plain.tolerance:g})"
    return Finding(difference <= plain.tolerance, observed)  # False for NaN
