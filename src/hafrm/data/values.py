"""Single values of a raw row, checked: text, lists, numbers, votes; and why a row is refused.

Rows come from strangers, so every value may be of any type and size. A check returns the value in
its proper type or raises `RefusedError` with one of `REASONS`; it never repairs. What is shown of
a bad value is short and safe to print. Standard library only.
"""

import math
import reprlib
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, Literal, NamedTuple, NoReturn, get_args

from hafrm.preferences import Votes

Reason = Literal[
    "empty response",
    "empty prompt",
    "chosen equals rejected",
    "prompts differ",
    "wrong roles",
    "not a string",
    "non-finite margin",
    "bad number",
    "too long",
    "lone surrogate",
    "duplicate",
    "missing column",
    "unreadable row",
    "not encodable",
]
REASONS: tuple[str, ...] = get_args(Reason)
"""Every reason for which a row can be refused. A margin or weight that is no usable number is a
"non-finite margin"; votes, ranks and scores are a "bad number"; NUL counts as "lone surrogate"; what
a chat template or a tokenizer refuses is "not encodable"."""

MAX_CHARS = 200_000
"""Default bound on a prompt or response in characters, set before any tokenizer sees them."""


class Refusal(NamedTuple):
    """Why a row was refused: one of `REASONS`, and what was seen."""

    reason: str
    detail: str


class RefusedError(Exception):
    """A rule is broken; `refusal` says which. It never leaves the reading of one row."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal)
        self.refusal = refusal


def refuse(reason: Reason, detail: str) -> NoReturn:
    """Raise `RefusedError`."""
    raise RefusedError(Refusal(reason, detail))


def show(value: object) -> str:
    """A short, safe `repr`: cut in width and depth, lone surrogates escaped."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother = 3, 60, 60
    return short.repr(value)


def check_text(text: str, name: str, max_chars: int = MAX_CHARS) -> None:
    """Refuse text that is too long, or that no UTF-8 file and no tokenizer can hold."""
    if len(text) > max_chars:
        refuse("too long", f"{name} has {len(text):,} characters, the limit is {max_chars:,}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        refuse("lone surrogate", f"{name} has {text[error.start]!r} at character {error.start}")
    if "\0" in text:
        refuse("lone surrogate", f"{name} has a NUL at character {text.index(chr(0))}")


def as_list(value: object, column: str) -> list[Any]:
    """A list or tuple as a list."""
    if not isinstance(value, list | tuple):
        refuse("not a string", f"`{column}` must be a list, got {show(value)}")
    return list(value)


def as_label(value: object, column: str) -> str:
    """An id or a tag; numbers are written out."""
    if not isinstance(value, str | int | float):
        refuse("not a string", f"`{column}` must be text or a number, got {show(value)}")
    check_text(str(value), f"`{column}`")
    return str(value)


def as_number(value: object, column: str, reason: Reason = "bad number") -> float:
    """A finite number; text and booleans are none, whatever they look like."""
    try:
        number = (
            math.nan if isinstance(value, bool) or not isinstance(value, Real) else float(value)
        )
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        refuse(reason, f"`{column}` must be a finite number, got {show(value)}")
    return number


def as_margin(value: object) -> float:
    """The margin of a row in reward units; 0 when it has none."""
    return 0.0 if value is None else as_number(value, "margin", "non-finite margin")


def as_weight(value: object) -> float:
    """The weight of a row's comparisons, not negative; 1 when it has none."""
    weight = 1.0 if value is None else as_number(value, "weight", "non-finite margin")
    if weight < 0:
        refuse("non-finite margin", f"`weight` must not be negative, got {weight:g}")
    return weight


def as_tie(value: object, label: object) -> bool:
    """Whether a row says that neither side was preferred: `tie: true` or `label: "tie"`."""
    if value is not None and not isinstance(value, bool):
        refuse("bad number", f"`tie` must be true or false, got {show(value)}")
    return bool(value) or (isinstance(label, str) and label.strip().lower() == "tie")


def as_votes(value: object) -> Votes | None:
    """Votes from {chosen, rejected, tie} or [chosen, rejected(, tie)]; None when a row has none."""
    if value is None:
        return None
    if isinstance(value, list | tuple):
        counts = dict(zip(Votes._fields, value, strict=False)) if 2 <= len(value) <= 3 else {}
    else:
        counts = dict(value) if isinstance(value, Mapping) else {}
    if not {"chosen", "rejected"} <= counts.keys() <= set(Votes._fields):
        refuse("bad number", f"`votes` must count chosen, rejected and tie, got {show(value)}")
    # a column that some rows fill comes back from Parquet as null in the others
    numbers = {
        name: 0.0 if count is None else as_number(count, "votes") for name, count in counts.items()
    }
    if any(number < 0 or number % 1 for number in numbers.values()):
        refuse("bad number", f"`votes` must be whole and not negative, got {show(value)}")
    return Votes(**{name: int(number) for name, number in numbers.items()})


def text_of(row: Mapping[Any, Any], column: str) -> str:
    """The text in a column that the row has."""
    value = row[column]
    if not isinstance(value, str):
        refuse("not a string", f"`{column}` must be text, got {show(value)}")
    return value


def number_of(row: Mapping[Any, Any], column: str) -> float:
    """The finite number in a column that the row has."""
    return as_number(row[column], column)


def choice_of(row: Mapping[Any, Any], column: str, allowed: Sequence[Any]) -> Any:
    """The value of a column that the row has, which must be one of those allowed, type included."""
    value = row[column]
    # 1 == True, and neither stands for the other here
    if not any(value == choice and type(value) is type(choice) for choice in allowed):
        choices = ", ".join(map(str, allowed))
        refuse("bad number", f"`{column}` must be one of {choices}; got {show(value)}")
    return value
