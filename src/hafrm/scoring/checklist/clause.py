"""A clause of the checklist, what judging it found, and the verdict over all of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from hafrm.errors import ModelError
from hafrm.scoring.checklist.subject import Subject

Outcome = Literal["pass", "fail", "not applicable"]


class Finding(NamedTuple):
    """Whether a clause holds (None: it does not apply), and what was seen."""

    holds: bool | None
    found: str


@dataclass(frozen=True)
class Clause:
    """One thing that a reward directory must fulfil."""

    name: str
    check: Callable[[Subject], Finding]
    mend: str
    """What to do where it does not hold."""
    needs: tuple[str, ...] = ()
    """Clauses without which this one cannot be judged, or would only repeat what they say."""
    runs_model: bool = False
    """Whether the weights are loaded for it."""


@dataclass(frozen=True)
class ClauseResult:
    """What became of one clause."""

    name: str
    outcome: Outcome
    found: str
    mend: str
    """Empty unless the clause failed."""


@dataclass(frozen=True)
class Verification:
    """All clauses of one directory."""

    path: str
    clauses: tuple[ClauseResult, ...]

    @property
    def ok(self) -> bool:
        """Whether no clause failed."""
        return all(result.outcome != "fail" for result in self.clauses)

    @property
    def failed(self) -> tuple[ClauseResult, ...]:
        """The clauses that do not hold."""
        return tuple(result for result in self.clauses if result.outcome == "fail")

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "path": self.path,
            "ok": self.ok,
            "clauses": [vars(result) for result in self.clauses],
        }


def judge(subject: Subject, clauses: Sequence[Clause]) -> Verification:
    """Every clause in its order; one whose needs did not pass is not applicable, and says why."""
    results: dict[str, ClauseResult] = {}
    for clause in clauses:
        waits = [n for n in clause.needs if n in results and results[n].outcome == "fail"]
        waits += [n for n in clause.needs if n in results and _was_held_up(results[n])]
        if waits:
            finding = Finding(None, f"{_HELD_UP}{waits[0]}")
        else:
            try:
                finding = clause.check(subject)
            except ModelError as error:
                finding = Finding(False, str(error))
        results[clause.name] = _result(clause, finding)
    return Verification(str(subject.path), tuple(results.values()))


_HELD_UP = "not judged before this holds: "


def _was_held_up(result: ClauseResult) -> bool:
    return result.outcome == "not applicable" and result.found.startswith(_HELD_UP)


def _result(clause: Clause, finding: Finding) -> ClauseResult:
    if finding.holds is None:
        return ClauseResult(clause.name, "not applicable", finding.found, "")
    if finding.holds:
        return ClauseResult(clause.name, "pass", finding.found, "")
    return ClauseResult(clause.name, "fail", finding.found, clause.mend)
