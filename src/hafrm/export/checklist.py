"""The checklist for anybody's reward directory: `verify_directory` checks it clause by clause.

A clause is one function on a `PlainModel` in clauses_on_files, clauses_on_text or clauses_on_scores, and
one entry of `CLAUSES`. Nothing is changed on disk.

    python -m hafrm.export.checklist DIR [TOLERANCE]

replays the golden scores of a directory in a process that has not loaded hafrm's engine: one conversation
at a time, and in batches padded on either side. It prints a line of JSON; exit code 1 means disagreement.
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hafrm.errors import ModelError
from hafrm.export import clauses_on_files, clauses_on_scores, clauses_on_text
from hafrm.export.golden import GOLDEN, read_golden
from hafrm.export.plain_model import TOLERANCE, Finding, GoldenReplay, PlainModel
from hafrm.table import Column, Table

ClauseOutcome = Literal["pass", "fail", "not applicable"]
_MARKS: dict[ClauseOutcome, str] = {"pass": "pass", "fail": "FAIL", "not applicable": "-"}
_WAITS = "not checked before this holds: "
_SETTINGS = ("one label", "raw reward", "no fresh weights", "pad is not EOS", "BOS once")
"""Clauses without which a consumer gets other scores without an error."""


@dataclass(frozen=True)
class Clause:
    """One thing that a reward directory must fulfil."""

    name: str
    check: Callable[[PlainModel], Finding]
    fix: str
    """What to do if it does not hold."""
    needs: tuple[str, ...] = ()
    """Clauses that must hold before this one can be checked."""


@dataclass(frozen=True)
class ClauseResult:
    """The outcome of one clause."""

    name: str
    outcome: ClauseOutcome
    observed: str
    fix: str
    """Empty unless the clause failed."""


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
        num_checked = sum(r.outcome != "not applicable" for r in self.clauses)
        num_failed = len(self.failed)
        rows = tuple(
            (
                _MARKS[result.outcome],
                result.name,
                f"{result.observed}\nfix: {result.fix}" if result.fix else result.observed,
            )
            for result in self.clauses
        )
        note = f"{num_checked - num_failed} of {num_checked} clauses hold"
        note += "" if self.ok else f", {num_failed} do not"
        columns = (Column(""), Column("clause"), Column("observed"))
        return (Table(self.path, columns, rows, (note,)),)


_LOADS = (
    "sequence classifier",
    "one label",
    "stock code",
    "safetensors only",
    "not quantised",
    "head without bias",
)
_SCORES = ("no fresh weights", "chat template", "ids have embeddings", "finite scores")

CLAUSES = (
    Clause(
        "sequence classifier",
        clauses_on_files.architecture,
        "save it by AutoModelForSequenceClassification, or re-export it (hafrm export)",
    ),
    Clause(
        "one label",
        clauses_on_files.one_label,
        'write "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0} into config.json',
        needs=("sequence classifier",),
    ),
    Clause(
        "raw reward",
        clauses_on_files.raw_reward,
        'write "problem_type": "regression" into config.json',
        needs=("sequence classifier",),
    ),
    Clause(
        "stock code",
        clauses_on_files.stock_code,
        "remove auto_map and the Python files; the class must be one of transformers",
    ),
    Clause(
        "safetensors only",
        clauses_on_files.safetensors_only,
        "save the weights with safetensors and delete the pickles",
    ),
    Clause(
        "not quantised",
        clauses_on_files.not_quantised,
        "remove quantization_config from config.json, once the weights are dequantised",
    ),
    Clause(
        "head without bias",
        clauses_on_files.head_without_bias,
        "keep one row score.weight; a bias shifts all rewards equally, so it can be dropped; after LoRA, "
        'train with modules_to_save=["score"] and merge',
        needs=("sequence classifier", "safetensors only"),
    ),
    Clause(
        "dtype stated",
        clauses_on_files.dtype_stated,
        'write the weights\' own "dtype" into config.json',
        needs=("safetensors only",),
    ),
    Clause(
        "rotary settings",
        clauses_on_files.rotary_keys,
        "write rope_theta (rope_scaling, partial_rotary_factor) into config.json beside rope_parameters",
    ),
    Clause(
        "no fresh weights",
        clauses_on_files.no_fresh_weights,
        "export again from the trained model: a copy or merge has lost weights",
        needs=_LOADS,
    ),
    Clause(
        "nothing left over",
        clauses_on_files.nothing_left_over,
        "save the classifier's own weights only; the LM head belongs in its own directory",
        needs=("no fresh weights",),
    ),
    Clause(
        "chat template",
        clauses_on_text.chat_template,
        "set tokenizer.chat_template to the format that was trained on, and save the tokenizer here",
    ),
    Clause(
        "no date in the template",
        clauses_on_text.no_date,
        "replace strftime_now(...) in the template with a fixed date",
        needs=("chat template",),
    ),
    Clause(
        "pad is not EOS",
        clauses_on_text.pad_is_not_eos,
        "choose an unused token as pad, in the tokenizer and as pad_token_id in config.json",
        needs=("chat template",),
    ),
    Clause(
        "ids have embeddings",
        clauses_on_text.ids_have_embeddings,
        "save the tokenizer that the model was trained with, or resize the embeddings",
        needs=("chat template",),
    ),
    Clause(
        "BOS once",
        clauses_on_text.bos_once,
        'write "add_bos_token": false, "add_eos_token": false into tokenizer_config.json, or take the BOS '
        "out of the tokenizer's post-processor",
        needs=("chat template",),
    ),
    Clause(
        "ends in EOS",
        clauses_on_text.ends_in_eos,
        "make the template end an assistant's last turn at the EOS, with nothing after it",
        needs=("chat template",),
    ),
    Clause(
        "inputs fit",
        clauses_on_files.inputs_fit,
        'write "model_input_names": ["input_ids", "attention_mask"] into tokenizer_config.json',
        needs=("no fresh weights", "chat template"),
    ),
    Clause(
        "finite scores",
        clauses_on_scores.finite_scores,
        "look for weights that are not finite; if the dtype is float16, export bf16 or fp32 instead",
        needs=("no fresh weights", "chat template", "ids have embeddings"),
    ),
    Clause(
        "last token",
        clauses_on_scores.last_token,
        "the class does not read the reward at the last token: use a stock decoder classifier",
        needs=(*_SCORES, "pad is not EOS"),
    ),
    Clause(
        "left = right padding",
        clauses_on_scores.same_on_both_sides,
        "the model attends to pads: pad on the right only, or use another attention implementation",
        needs=(*_SCORES, "pad is not EOS"),
    ),
    Clause(
        "batch 1 = batch N",
        clauses_on_scores.same_in_a_batch,
        "find what depends on the batch (normalisation, dropout, a kernel); score one at a time until then",
        needs=(*_SCORES, "pad is not EOS"),
    ),
    Clause(
        "golden scores",
        clauses_on_scores.golden_scores,
        "weights, tokenizer or template differ from the exported ones; export again",
        needs=(*_SCORES, "last token", "BOS once", "ends in EOS", "no date in the template"),
    ),
)
"""In the order of checking: a clause comes after those that it needs."""


def verify_directory(
    path: Path,
    golden: Path | None = None,
    *,
    tolerance: float = TOLERANCE,
    run_model: bool = True,
) -> Verification:
    """Check a reward directory, anybody's, by every clause; without `run_model` the model is not loaded.

    Golden scores are replayed from `golden`, or from the directory's own file if it has one.
    Raises ModelError when there is no model, DataError for a damaged golden file.
    """
    if not (path / "config.json").is_file():
        is_adapter = (path / "adapter_config.json").is_file()
        what = (
            "a LoRA adapter, which is verified when it is exported; merge it (hafrm export RUN "
            "--out DIR --merge-lora) to verify what servers load"
            if is_adapter
            else "not a model directory: it has no config.json"
        )
        raise ModelError(f"{path} is {what}")
    own = path / GOLDEN
    file = golden or (own if own.is_file() else None)
    plain = PlainModel(path, [] if file is None else read_golden(file), tolerance)
    return check_clauses(plain, CLAUSES if run_model else clauses_on_disk())


def clauses_on_disk() -> tuple[Clause, ...]:
    """The clauses that need no loaded model: those before "no fresh weights" and not depending on it."""
    needs_model = {"no fresh weights"}
    for clause in CLAUSES:
        if needs_model & set(clause.needs):
            needs_model.add(clause.name)
    return tuple(clause for clause in CLAUSES if clause.name not in needs_model)


def check_clauses(plain: PlainModel, clauses: Sequence[Clause]) -> Verification:
    """Check the clauses in order; one whose needs do not hold is not applicable, and says why."""
    results: dict[str, ClauseResult] = {}
    for clause in clauses:
        needs = [results[name] for name in clause.needs if name in results]
        # Failed clauses first, then those that themselves wait: the first one is the reason.
        reasons = [r.name for r in needs if r.outcome == "fail"]
        reasons += [r.name for r in needs if r.observed.startswith(_WAITS)]
        if reasons:
            finding = Finding(None, f"{_WAITS}{reasons[0]}")
        else:
            try:
                finding = clause.check(plain)
            except ModelError as error:
                finding = Finding(False, str(error))
        outcomes: dict[bool | None, ClauseOutcome] = {
            None: "not applicable",
            True: "pass",
            False: "fail",
        }
        fix = clause.fix if finding.holds is False else ""
        results[clause.name] = ClauseResult(
            clause.name, outcomes[finding.holds], finding.observed, fix
        )
    is_ok = all(result.outcome != "fail" for result in results.values())
    return Verification(str(plain.path), is_ok, tuple(results.values()))


def replay_directory(directory: Path) -> GoldenReplay:
    """Largest differences to the golden scores, and what else is wrong with the directory."""
    plain = PlainModel(directory, read_golden(directory))
    # An adapter has no config of its own: it is its base model's.
    names = ("BOS once",) if plain.is_adapter else _SETTINGS
    failed = check_clauses(plain, [clause for clause in CLAUSES if clause.name in names]).failed
    if failed:
        return GoldenReplay({}, [f"{result.name}: {result.observed}" for result in failed])
    return plain.replay(("right", "left"))


def replay_as_process() -> None:
    """Replay the directory that the command line names, within the tolerance that it gives."""
    result = replay_directory(Path(sys.argv[1]))
    tolerance = float(sys.argv[2]) if len(sys.argv) > 2 else TOLERANCE
    # "not all(x <= t)" instead of "any(x > t)": NaN must fail
    agree = all(difference <= tolerance for difference in result.differences.values())
    is_ok = agree and not result.faults
    sys.stdout.write(json.dumps({"ok": is_ok, **result._asdict()}) + "\n")
    sys.exit(0 if is_ok else 1)


if __name__ == "__main__":
    replay_as_process()
