"""The checklist: what any reward directory needs so that every consumer gets its scores.

    python -m hafrm.export.checklist DIR TOLERANCE   # in a process without hafrm's engine

replays golden scores alone and in padded batches, and prints a line of JSON; exit code 1 if they differ.
"""

import inspect
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hafrm.errors import ModelError
from hafrm.export.plain_model import (
    GOLDEN,
    PROBES,
    TOLERANCE,
    GoldenReplay,
    PlainModel,
    largest_difference,
    old_rotary_keys,
    read_golden,
)
from hafrm.results import Column, Table

Finding = tuple[bool | None, str]
"""(whether a clause holds, or None if it does not apply; what was observed)."""
Check = Callable[[PlainModel], Finding]
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_OTHER_HEADS = ("v_head.", "value_head.", "classifier.", "score.bias")


class Clause(NamedTuple):
    """One condition on a reward directory, checked once the clauses that it `needs` hold."""

    name: str
    check: Check
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class ClauseResult:
    """The outcome of one clause."""

    name: str
    outcome: str  # pass, fail or not applicable
    observed: str
    fix: str  # empty unless the clause failed


@dataclass(frozen=True)
class Verification:
    """All clauses of one directory."""

    path: str
    ok: bool
    clauses: tuple[ClauseResult, ...]

    @property
    def failed(self) -> tuple[ClauseResult, ...]:
        """The clauses that do not hold."""
        return tuple(result for result in self.clauses if result.outcome == "fail")

    def tables(self) -> tuple[Table, ...]:
        """Every clause with what was observed and, if it failed, how to fix it."""
        num_checked = sum(result.outcome != "not applicable" for result in self.clauses)
        rows = tuple(
            (r.outcome, r.name, f"{r.observed}\nfix: {r.fix}" if r.fix else r.observed)
            for r in self.clauses
        )
        note = f"{num_checked - len(self.failed)} of {num_checked} clauses hold"
        columns = (Column(""), Column("clause"), Column("observed"))
        return (Table(self.path, columns, rows, (note,)),)


def verify_directory(
    path: Path, golden: Path | None = None, *, tolerance: float = TOLERANCE, run_model: bool = True
) -> Verification:
    """Check any reward directory by every clause; without `run_model`, only its files and rendered text.

    Golden scores are replayed from `golden`, or from the directory's own file if it has one.
    Raises ModelError if there is no model, DataError for a damaged golden file.
    """
    if (path / "adapter_config.json").is_file():
        raise ModelError(
            f"{path} is a LoRA adapter, verified when it is exported; to verify what servers load, merge "
            "it: hafrm export RUN --out DIR --merge-lora"
        )
    if not (path / "config.json").is_file():
        raise ModelError(f"{path} is not a model directory: it has no config.json")
    if golden is None and (path / GOLDEN).is_file():
        golden = path
    plain = PlainModel(path, [] if golden is None else read_golden(golden), tolerance)
    return check_clauses(plain, CLAUSES if run_model else _ON_FILES_AND_TEXT)


def check_clauses(plain: PlainModel, clauses: Sequence[Clause]) -> Verification:
    """Check the clauses in order; a clause is not applicable if one that it needs does not hold."""
    results: list[ClauseResult] = []
    # what keeps a clause from being checked: a failed clause, however many lie between the two
    reasons: dict[str, str] = {}
    for name, check, needs in clauses:
        holds: bool | None = None
        if reason := next((reasons[need] for need in needs if need in reasons), None):
            observed = f"not checked before this holds: {reason}"
        else:
            try:
                holds, observed = check(plain)
            except ModelError as error:
                holds, observed = False, str(error)
        if reason or holds is False:
            reasons[name] = reason or name
        fix = _FIXES[name] if holds is False else ""
        outcome = "not applicable" if holds is None else "pass" if holds else "fail"
        results.append(ClauseResult(name, outcome, observed, fix))
    return Verification(str(plain.path), all(r.outcome != "fail" for r in results), tuple(results))


def replay_directory(directory: Path) -> GoldenReplay:
    """Largest differences to the golden scores, and what else is wrong with the directory."""
    plain = PlainModel(directory, read_golden(directory))
    # if these fail, a consumer gets other scores and no error; an adapter has no config of its own
    names = {"BOS once"}
    if not plain.is_adapter:
        names |= {"one label", "raw reward", "no fresh weights", "pad is not EOS"}
    failed = check_clauses(plain, [clause for clause in CLAUSES if clause.name in names]).failed
    if failed:
        return GoldenReplay({}, [f"{result.name}: {result.observed}" for result in failed])
    return plain.replay(("right", "left"))


def _none(what: str, find: Callable[[PlainModel], Iterable[object]]) -> Check:
    """A check that `find` finds nothing."""

    def check(plain: PlainModel) -> Finding:
        names = sorted(map(str, find(plain)))
        return not names, f"{what}: {', '.join(names[:4]) or 'none'}"

    return check


def _config(key: str, is_right: Callable[[Any], bool]) -> Check:
    """A check of one value in config.json."""
    return lambda plain: (is_right(plain.config.get(key)), f"{key} {plain.config.get(key)!r}")


def _is_classifier(names: Any) -> bool:
    # other names are other tasks to servers: vLLM turns ...ForRewardModel into an embedding model; a
    # ...ForCausalLM is loaded with a random head (reward-bench#210)
    return len(names or ()) == 1 and str(names[0]).endswith("ForSequenceClassification")


def _own_code(plain: PlainModel) -> list[str]:
    # an auto_map asks for trust_remote_code, and some servers run it without asking
    names = ("config.json", "tokenizer_config.json")
    maps = [f"auto_map in {name}" for name in names if plain.read_json(name).get("auto_map")]
    return maps + [file.name for file in plain.path.rglob("*.py")]


def _safetensors_only(plain: PlainModel) -> Finding:
    # a pickle runs code when it is loaded
    pickles = sorted(f.name for f in plain.path.rglob("*") if f.suffix in _PICKLES)
    if pickles:
        return False, f"pickles: {', '.join(pickles)}"
    return bool(plain.weights), f"{len(plain.weights)} tensors in safetensors"


def _head_without_bias(plain: PlainModel) -> Finding:
    # vLLM and SGLang have no place for a bias; without score.weight loaders initialise one at random
    others = sorted(name for name in plain.weights if name.startswith(_OTHER_HEADS))
    shape, width = plain.weights.get("score.weight", ()), plain.text_config.get("hidden_size")
    right = len(shape) == 2 and shape[0] == 1 and width in (None, shape[1])
    return right and not others, f"score.weight {list(shape)}, other heads {others}"


def _rotary_settings(plain: PlainModel) -> Finding:
    # without the old names transformers 4 silently uses other frequencies (vllm#42624)
    for config in (plain.config, plain.text_config):
        for key, value in old_rotary_keys(config).items():
            # 10,000 is version 4's default for most classes
            theirs = config.get(key, 10000.0 if key == "rope_theta" else None)
            if theirs != value:
                return False, f"{key} is {value}, but {theirs} for transformers 4"
    return True, "transformers 4 and 5 rotate alike"


def _chat_template(plain: PlainModel) -> Finding:
    if not plain.tokenizer.chat_template:
        return False, "the tokenizer has no chat template"
    turns = [(turn["content"], plain.render(probe)) for probe in PROBES for turn in probe]
    lost = [content for content, text in turns if content.strip() not in text]
    if lost:
        return False, f"the template leaves out {lost[0][:40]!r}"
    return True, f"{type(plain.tokenizer).__name__}, renders {len(PROBES)} conversations"


def _no_date(plain: PlainModel) -> Finding:
    template = str(plain.tokenizer.chat_template)
    # The macro overrides the clock that transformers offers. 1 and 31 differ as text and as numbers.
    clock = "{{% macro strftime_now(format) %}}{}{{% endmacro %}}"
    first, second = (plain.render(PROBES[0], clock.format(d) + template) for d in (1, 31))
    return first == second, "the same" if first == second else "the template writes a date"


def _pad_is_not_eos(plain: PlainModel) -> Finding:
    # transformers skips trailing pads, servers do not: with pad = EOS it reads one token early
    # (transformers#35352, RLHFlow#49)
    pad, theirs = plain.text_config.get("pad_token_id"), plain.tokenizer.pad_token_id
    if pad is None:  # if a nested config leaves it to the outer one
        pad = plain.config.get("pad_token_id")
    ends = plain.ends
    right = pad is not None and pad == theirs and pad not in ends
    return right, f"pad {pad} in the config, {theirs} in the tokenizer; EOS {sorted(ends)}"


def _ids_have_embeddings(plain: PlainModel) -> Finding:
    tokens, size = len(plain.tokenizer), plain.text_config.get("vocab_size")
    return size is not None and tokens <= size, f"{tokens} tokens, {size} embeddings"


def _bos_once(plain: PlainModel) -> Finding:
    # pipelines add special tokens, TRL and OpenRLHF do not: the template's BOS would get a second one
    for text in plain.texts:
        added, bare = (plain.ids(text, add_special_tokens=special) for special in (True, False))
        if added != bare:
            observed = f"the tokenizer adds ids: {added[:2]}... {added[-2:]}"
            return False, f"{observed}; BOS is {plain.tokenizer.bos_token_id}"
    return True, "no id is added to a rendered text"


def _ends_in_eos(plain: PlainModel) -> Finding:
    # the reward is read where it was trained, at the EOS (TRL#5813, gpt-neox#1285)
    trained = {line.input_ids[-1] for line in plain.golden if line.input_ids}
    for text in map(plain.render, PROBES):
        last = plain.ids(text)[-1]
        if last not in plain.ends or (trained and last not in trained):
            observed = f"it ends in {text[-24:]!r}, id {last}; EOS {sorted(plain.ends)}"
            return False, f"{observed}; training read at {sorted(trained)}"
    return True, f"it ends in {plain.tokenizer.convert_ids_to_tokens(last)!r}"


def _fresh_weights(plain: PlainModel) -> list[Any]:
    info = plain.loaded[1]
    return [*info["missing_keys"], *info.get("mismatched_keys", ())]


def _refused_inputs(plain: PlainModel) -> set[str]:
    taken = inspect.signature(type(plain.loaded[0]).forward).parameters
    return set(plain.tokenizer("a")) - set(taken)


def _finite_scores(plain: PlainModel) -> Finding:
    # reward-bench runs float16, which overflows where float32 does not
    low, high = float(plain.alone.min()), float(plain.alone.max())
    is_finite = bool(torch.isfinite(plain.alone).all())
    return is_finite, f"{len(plain.alone)} rewards from {low:.4g} to {high:.4g}"


def _left_is_right_padding(plain: PlainModel) -> Finding:
    # TRL#937, reward-bench#137
    right, left = plain.score(plain.texts, "right"), plain.score(plain.texts, "left")
    bare = plain.score(plain.texts, "left", positions=False)
    holds, observed = _within(plain, left, right)
    shift = largest_difference(bare, right)
    if holds and not shift <= plain.tolerance:
        observed += f"; left padding without position_ids is off by {shift:.2g}: pad right"
    return holds, observed


def _golden_scores(plain: PlainModel) -> Finding:
    if not plain.golden:
        return None, "the directory has no golden_scores.jsonl, and none was given"
    replay = plain.replay()
    if replay.faults:
        return False, replay.faults[0]
    return _tolerated(plain, replay.differences["alone"])


def _within(plain: PlainModel, values: Tensor, expected: Tensor) -> Finding:
    return _tolerated(plain, largest_difference(values, expected))


def _tolerated(plain: PlainModel, difference: float) -> Finding:
    observed = f"largest difference {difference:.2g} (tolerated {plain.tolerance:g})"
    return difference <= plain.tolerance, observed  # False for NaN


_CLASSIFIER, _TEMPLATE, _MODEL = ("sequence classifier",), ("chat template",), ("no fresh weights",)
_SCORES = ("finite scores", "pad is not EOS")
_ON_FILES_AND_TEXT = (
    Clause("sequence classifier", _config("architectures", _is_classifier)),
    # num_labels is not stored, and its default is two (OpenRLHF#1039)
    Clause("one label", _config("id2label", lambda names: len(names or {}) == 1), _CLASSIFIER),
    # or pipelines and vLLM give the reward's sigmoid (vllm#20807)
    Clause("raw reward", _config("problem_type", lambda k: k == "regression"), _CLASSIFIER),
    Clause("stock code", _none("code of its own", _own_code)),
    Clause("safetensors only", _safetensors_only),
    # left over from the base model: loaders would quantise again
    Clause("not quantised", _config("quantization_config", lambda left: not left)),
    Clause("head without bias", _head_without_bias, (*_CLASSIFIER, "safetensors only")),
    Clause("rotary settings", _rotary_settings),
    Clause("chat template", _chat_template),
    Clause("no date in the template", _no_date, _TEMPLATE),
    Clause("pad is not EOS", _pad_is_not_eos, _TEMPLATE),
    Clause("ids have embeddings", _ids_have_embeddings, _TEMPLATE),
    Clause("BOS once", _bos_once, _TEMPLATE),
    Clause("ends in EOS", _ends_in_eos, _TEMPLATE),
)
_LOADABLE = ("one label", "stock code", "safetensors only", "not quantised", "head without bias")
_TEXTS = ("BOS once", "ends in EOS", "no date in the template")
CLAUSES = (
    *_ON_FILES_AND_TEXT,
    # transformers initialises missing weights at random, with only a warning (ms-swift#6129)
    Clause("no fresh weights", _none("at random", _fresh_weights), (*_CLASSIFIER, *_LOADABLE)),
    # vLLM refuses a file with an LM head (vllm#21176)
    Clause("nothing left over", _none("surplus", lambda p: p.loaded[1]["unexpected_keys"]), _MODEL),
    # decoders refuse token_type_ids
    Clause("inputs fit", _none("refused", _refused_inputs), (*_MODEL, *_TEMPLATE)),
    Clause("finite scores", _finite_scores, (*_MODEL, "ids have embeddings")),
    # vLLM and SGLang read at the literal last token (TRL#6952, TRL#3750)
    Clause("last token", lambda p: _within(p, p.alone, p.scores_by_hand()), _SCORES),
    Clause("left = right padding", _left_is_right_padding, _SCORES),
    # reward-bench#137, NeMo-Aligner#439
    Clause("batch 1 = batch N", lambda p: _within(p, p.score(p.texts), p.alone), _SCORES),
    Clause("golden scores", _golden_scores, ("last token", *_TEXTS)),
)
"""In the order in which they are checked: a clause comes after those that it needs."""

_FIXES = {
    "sequence classifier": "save it by AutoModelForSequenceClassification, or hafrm export it again",
    "one label": 'write "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0} into config.json',
    "raw reward": 'write "problem_type": "regression" into config.json',
    "stock code": "remove auto_map and the Python files; the class must be one of transformers",
    "safetensors only": "save the weights with safetensors and delete the pickles",
    "not quantised": "dequantise the weights and remove quantization_config from config.json",
    "head without bias": "keep one row score.weight and no bias, which shifts all rewards equally; with "
    'LoRA, train with modules_to_save=["score"] and merge',
    "rotary settings": "write rope_theta (rope_scaling, ...) into config.json beside rope_parameters",
    "chat template": "set tokenizer.chat_template to the format of training; save the tokenizer here",
    "no date in the template": "replace strftime_now(...) in the template with a fixed date",
    "pad is not EOS": "choose an unused token as pad, in the tokenizer and in config.json",
    "ids have embeddings": "save the tokenizer that was trained with, or resize the embeddings",
    "BOS once": 'write "add_bos_token": false, "add_eos_token": false into tokenizer_config.json, or take '
    "the BOS out of the tokenizer's post-processor",
    "ends in EOS": "make the template end an assistant's last turn at the EOS, with nothing after it",
    "no fresh weights": "export again from the trained model: a copy or merge has lost weights",
    "nothing left over": "save the classifier's own weights only; an LM head has its own directory",
    "inputs fit": 'write "model_input_names": ["input_ids", "attention_mask"] into tokenizer_config.json',
    "finite scores": "look for weights that are not finite; instead of float16, export bfloat16",
    "last token": "the class reads the reward elsewhere: use a stock decoder classifier",
    "left = right padding": "the model attends to pads: pad right, or use other attention",
    "batch 1 = batch N": "find what depends on the batch (normalisation, dropout, a kernel)",
    "golden scores": "weights, tokenizer or template are not those that were exported; export again",
}

if __name__ == "__main__":
    replayed = replay_directory(Path(sys.argv[1]))
    # "not all(x <= t)" instead of "any(x > t)": NaN must fail
    agree = all(value <= float(sys.argv[2]) for value in replayed.differences.values())
    ok = agree and not replayed.faults
    sys.stdout.write(json.dumps({"ok": ok, **replayed._asdict()}) + "\n")
    sys.exit(0 if ok else 1)
