"""The checklist for anybody's reward directory: `verify_directory` checks it clause by clause.

Its clauses are in `clauses`. Nothing is changed on disk.

    python -m hafrm.export.checklist DIR [TOLERANCE]

replays the golden scores of a directory in a process that has not loaded hafrm's engine: one conversation
at a time, and in batches padded on either side. It prints a line of JSON; exit code 1 means disagreement.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hafrm.errors import ModelError
from hafrm.export.clauses import CLAUSES, Clause
from hafrm.export.golden import GOLDEN, read_golden
from hafrm.export.plain_model import TOLERANCE, Finding, GoldenReplay, PlainModel
from hafrm.table import Column, Table

ClauseOutcome = Literal["pass", "fail", "not applicable"]
_OUTCOMES: dict[bool | None, ClauseOutcome] = {True: "pass", False: "fail", None: "not applicable"}
_MARKS: dict[ClauseOutcome, str] = {"pass": "pass", "fail": "FAIL", "not applicable": "-"}
_SETTINGS = ("one label", "raw reward", "no fresh weights", "pad is not EOS", "BOS once")
"""Clauses without which a consumer gets other scores without an error."""


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
            (_MARKS[r.outcome], r.name, f"{r.observed}\nfix: {r.fix}" if r.fix else r.observed)
            for r in self.clauses
        )
        note = f"{num_checked - num_failed} of {num_checked} clauses hold"
        note += "" if self.ok else f", {num_failed} do not"
        columns = (Column(""), Column("clause"), Column("observed"))
        return (Table(self.path, columns, rows, (note,)),)


def verify_directory(
    path: Path, golden: Path | None = None, *, tolerance: float = TOLERANCE, run_model: bool = True
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
    needs_model = set[str]() if run_model else {"no fresh weights"}
    for clause in CLAUSES:
        if needs_model & set(clause.needs):
            needs_model.add(clause.name)
    return check_clauses(plain, [clause for clause in CLAUSES if clause.name not in needs_model])


def check_clauses(plain: PlainModel, clauses: Sequence[Clause]) -> Verification:
    """Check the clauses in order; one whose needs do not hold is not applicable, and says why."""
    results: dict[str, ClauseResult] = {}
    # What keeps a clause from being checked: a failed clause, whatever lies between the two.
    reasons: dict[str, str] = {}
    for clause in clauses:
        reason = next((reasons[name] for name in clause.needs if name in reasons), None)
        if reason is not None:
            finding = Finding(None, f"not checked before this holds: {reason}")
        else:
            try:
                finding = clause.check(plain)
            except ModelError as error:
                finding = Finding(False, str(error))
        if reason is not None or finding.holds is False:
            reasons[clause.name] = reason or clause.name
        fix = clause.fix if finding.holds is False else ""
        outcome = _OUTCOMES[finding.holds]
        results[clause.name] = ClauseResult(clause.name, outcome, finding.observed, fix)
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
