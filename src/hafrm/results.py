"""Results: dataclasses that are shown as `Table`s, and stored as JSON (nan and infinity as null).

Only this module decides how a number or an interval is written.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_jsonable_python

from hafrm.atomic import atomic_write
from hafrm.errors import CheckpointError
from hafrm.statistics import Estimate

T = TypeVar("T")
Cell = str | int | float | Estimate | None
Kind = Literal["text", "count", "percent", "points", "decimal", "p", "general"]
"""How the plain numbers of a column are written; an Estimate knows whether it is a fraction."""

_WRITE: dict[Kind, Callable[[int | float], str]] = {
    "text": str,
    "count": str,
    "percent": lambda x: f"{100 * x:.1f} %",
    "points": lambda x: f"{100 * x:+.1f}",
    "decimal": lambda x: f"{x:.3f}",
    "p": lambda x: f"{x:.3g}",
    "general": lambda x: f"{x:.4g}",
}


@dataclass(frozen=True, slots=True)
class Column:
    """One column: its heading, and how its numbers are written."""

    name: str
    kind: Kind = "text"


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under columns, with a title above and notes below."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()  # sentences a reader needs beside the numbers

    def texts(self) -> tuple[tuple[str, ...], ...]:
        """Every cell as text, row by row."""
        kinds = [column.kind for column in self.columns]
        return tuple(
            tuple(format_cell(cell, kind) for cell, kind in zip(row, kinds, strict=True))
            for row in self.rows
        )


def columns(heads: str) -> tuple[Column, ...]:
    """Columns from their headings with `|` between them, each with its kind after a colon unless text.

    >>> columns("set | comparisons: count | accuracy [95 %]: percent")
    """
    parts = [head.strip().rpartition(": ") for head in heads.split("|")]
    result = tuple(Column(name or kind, kind if name else "text") for name, _, kind in parts)  # type: ignore[arg-type]
    assert all(column.kind in _WRITE for column in result)
    return result


def format_cell(cell: Cell, kind: Kind = "text") -> str:
    """A cell as text: "" for None, "n/a" for NaN, an Estimate with its interval."""
    if cell is None:
        return ""
    if isinstance(cell, str | Estimate):
        return str(cell)
    if math.isnan(cell):
        return "n/a"
    return _WRITE[kind](cell)


def to_markdown(table: Table) -> str:
    """The table in GitHub's Markdown with its notes below; the caller writes the title as a heading."""
    heading = [column.name for column in table.columns]
    rule = ["---" if column.kind == "text" else "---:" for column in table.columns]
    # a bar would end the cell, a line break the row
    rows = [
        [" ".join(_escaped(text).replace("|", "\\|").split()) for text in row]
        for row in (heading, *table.texts())
    ]
    lines = [f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:])]
    lines += [line for note in table.notes for line in ("", _escaped(note))]
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    for mark in ("\\", "`", "*", "_", "<"):
        text = text.replace(mark, "\\" + mark)
    return text


def to_plain(value: Any) -> Any:
    """A value for JSON: dataclasses as objects, numbers of numpy and torch unpacked, nan as null."""
    # numpy and torch have `tolist`, arrays and scalars
    return to_jsonable_python(value, inf_nan_mode="null", fallback=lambda array: array.tolist())


def from_plain(kind: type[T], value: Any, place: Path | str = "a stored result") -> T:
    """The dataclass `kind` from the output of `to_plain`; CheckpointError, naming `place`, for others."""
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        problem = (
            f"{'.'.join(map(str, first['loc']))}: {first['msg']} (problems: {error.error_count()})"
        )
        raise CheckpointError(
            f"{place} is not a valid {kind.__name__} of this version: {problem}"
        ) from error


def write_result(path: Path, result: Any) -> None:
    """Write a result as JSON, complete or not at all; the folder is created if it is missing."""
    text = json.dumps(to_plain(result), indent=1, ensure_ascii=False, allow_nan=False)
    atomic_write(path, text + "\n")


def read_result(path: Path, kind: type[T]) -> T:
    """Read a result that `write_result` wrote; raises CheckpointError for any other file."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}; make it again") from error
    return from_plain(kind, value, path)
