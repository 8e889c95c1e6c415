"""The comparisons to read: those the model gets most wrong, and those whose label is most doubtful."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from hafrm.evaluation.diagnostics.decided import Decided
from hafrm.evaluation.diagnostics.label_noise import mean_margin, suspicious
from hafrm.evaluation.metrics import Result
from hafrm.preferences import Message

MAX_CHARS = 400
"""Of each text; what is longer is cut, and says so."""
WRONG = "largest wrong margin"


@dataclass(frozen=True, slots=True)
class Example(Result):
    """One comparison as people read it."""

    set: str
    prompt: str
    """Its end."""
    chosen: str
    rejected: str
    margin: float
    """The model's own, below zero."""
    votes: tuple[int, int, int] | None
    """For chosen, rejected, tie."""
    why: str


def worst(
    decided: Decided, margins: Float[np.ndarray, "models comparisons"], *, num: int = 10
) -> tuple[Example, ...]:
    """The first model's `num` largest wrong margins; with several models, `num` more doubtful labels.

    No two examples share prompt and rejected response, which one bad response would otherwise fill.
    """
    own, several = margins[0], len(margins) > 1
    mean, against = mean_margin(margins), suspicious(margins, len(own)) if several else []
    all_against = set(against)

    def doubt(row: int) -> str:
        return f"all models are against the label, {-mean[row]:.1f} times as clearly as usual"

    wrong = [int(row) for row in np.argsort(own, kind="stable") if own[row] < 0]
    rows = _distinct(decided, wrong, num)
    why = {row: f"{WRONG}; {doubt(row)}" if row in all_against else WRONG for row in rows}
    known = _distinct(decided, [*rows, *against], num + len(rows))
    why |= {row: doubt(row) for row in known[len(rows) :]}
    return tuple(_example(decided, own, row, each) for row, each in why.items())


def cut_text(text: str, *, end: bool = False, max_chars: int = MAX_CHARS) -> str:
    """The text's first (or last) characters, with the number of those that are left out."""
    text = text.strip()
    left_out = len(text) - max_chars
    if left_out <= 0:
        return text
    note = f"[{left_out} more characters]"
    return f"{note} {text[-max_chars:]}" if end else f"{text[:max_chars]} {note}"


def shown_prompt(prompt: Sequence[Message]) -> str:
    """A single user message as it is; a conversation with its roles; cut at its start."""
    if len(prompt) == 1 and prompt[0].role == "user":
        return cut_text(prompt[0].content, end=True)
    return cut_text("\n".join(f"{m.role}: {m.content}" for m in prompt), end=True)


def _distinct(decided: Decided, rows: Sequence[int], num: int) -> list[int]:
    """The first `num` rows of those with the same prompt and rejected response but one."""
    seen: dict[tuple[str, str], int] = {}
    for row in rows:
        if len(seen) == num:
            break
        seen.setdefault((str(decided.prompts[row]), decided.rejected[row]), row)
    return list(seen.values())


def _example(
    decided: Decided, margins: Float[np.ndarray, " comparisons"], row: int, why: str
) -> Example:
    group, votes = decided.groups[decided.owner[row]], decided.comparisons[row].votes
    return Example(
        set=group.source,
        prompt=shown_prompt(group.prompt),
        chosen=cut_text(decided.chosen[row]),
        rejected=cut_text(decided.rejected[row]),
        margin=float(margins[row]),
        votes=None if votes is None else (votes.chosen, votes.rejected, votes.tie),
        why=why,
    )
