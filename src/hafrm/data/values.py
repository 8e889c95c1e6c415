"""Single values of a raw row, checked: text, lists, numbers, votes; and why a row is refused or left out.

Rows come from anywhere, so a value may be of any type and size. A check returns the value in its proper
type or raises `RefusedError`; it never repairs. Quoted values are short and safe to print.
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
    "non-finite margin",  # a margin or weight that is no usable number
    "bad number",  # votes, ranks, scores
    "too long",
    "lone surrogate",  # and NUL
    "duplicate",
    "missing column",
    "unreadable row",
    "not encodable",  # the chat template or the tokenizer refuses it
]
BAD_ROW_REASONS: tuple[str, ...] = get_args(Reason)

MAX_CHARS = 200_000
"""Default limit of a prompt or response in characters, checked before any tokenizer sees it."""

RawRow = Mapping[Any, Any]


class Refusal(NamedTuple):
    """Why a row is bad: one of `BAD_ROW_REASONS`, and the value that was seen."""

    reason: str
    detail: str


class LeftOut(NamedTuple):
    """Why a good row of a published set is not used; rows are counted by reason."""

    reason: str


class RefusedError(Exception):
    """A row breaks a rule; raised and caught within the reading of one row."""

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


def cell_of(row: RawRow, column: str) -> Any:
    """The value in a column, whatever it is."""
    if column not in row:
        columns = show([str(name)[:40] for name in row])
        refuse("missing column", f"no `{column}`; columns: {columns}")
    return row[column]


def text_of(row: RawRow, column: str) -> str:
    """The text in a column."""
    value = cell_of(row, column)
    if not isinstance(value, str):
        refuse("not a string", f"`{column}` must be text, got {show(value)}")
    return value


def choice_of(row: RawRow, column: str, allowed: Sequence[Any]) -> Any:
    """The value in a column, which must be one of those allowed, type included."""
    value = cell_of(row, column)
    # 1 == True in Python, but a label 1 is not a label True
    if not any(value == choice and type(value) is type(choice) for choice in allowed):
        choices = ", ".join(map(str, allowed))
        refuse("bad number", f"`{column}` must be one of {choices}; got {show(value)}")
    return value


def number_of(row: RawRow, column: str) -> float:
    """The finite number in a column."""
    return as_number(cell_of(row, column), column)


def as_number(value: object, column: str, reason: Reason = "bad number") -> float:
    """A finite number."""
    # text and booleans are refused, whatever they look like
    try:
        is_number = isinstance(value, Real) and not isinstance(value, bool)
        number = float(value) if is_number else math.nan  # type: ignore[arg-type]
    except OverflowError:  # an integer above 1e308
        number = math.inf
    if not math.isfinite(number):
        refuse(reason, f"`{column}` must be a finite number, got {show(value)}")
    return number


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
    # a column that only some rows fill comes back from Parquet as null in the others
    numbers = {k: 0.0 if n is None else as_number(n, "votes") for k, n in counts.items()}
    if any(number < 0 or number % 1 for number in numbers.values()):
        refuse("bad number", f"`votes` must be whole and not negative, got {show(value)}")
    return Votes(**{name: int(number) for name, number in numbers.items()})


def as_list(value: object, column: str) -> list[Any]:
    """A list or tuple as a list."""
    if not isinstance(value, list | tuple):
        refuse("not a string", f"`{column}` must be a list, got {show(value)}")
    return list(value)


def as_label(value: object, column: str) -> str:
    """An id or a tag as text."""
    if not isinstance(value, str | int | float):
        refuse("not a string", f"`{column}` must be text or a number, got {show(value)}")
    check_text(str(value), f"`{column}`")
    return str(value)
