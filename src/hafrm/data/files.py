"""Files and hub data sets -> numbered raw rows, and checks of raw values; `parse` interprets the rows.

A line that cannot be decoded becomes a `Refusal` in its place, so that it is counted; a file that cannot
be read at all raises `DataError`. Row numbers count lines (JSON lines) or records, from 0.
"""

import csv
import gzip
import io
import json
import lzma
import math
import os
import re
import reprlib
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from numbers import Real
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn, cast

from hafrm.errors import DataError

Reason = Literal[
    "empty response", "empty prompt", "chosen equals rejected", "prompts differ", "wrong roles",
    "not a string", "non-finite margin", "bad number", "too long", "unusable character", "duplicate",
    "missing column", "unreadable row", "unread context", "unknown label", "not encodable",
]  # fmt: skip
"""Why rows are bad. "non-finite margin": a margin or weight is not a usable number; "bad number": votes, a
rank or a score is not; "not encodable": the chat template or the tokenizer refuses the row."""
MAX_NUMBER = 1e15  # larger ones overflow in float32 when a gradient is squared
MAX_CHARS = 200_000
"""Limit of a prompt or response in characters, checked before any tokenizer sees it."""
RawRow = Mapping[Any, Any]
NumberedRows = Iterator[tuple[int, object]]

_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
# how the cells of a CSV file are read: JSON, and text even if empty
_JSON_CELLS = frozenset(
    ["responses", "ranks", "ranking", "scores", "ratings", "votes", "margin", "weight", "tie"]
)
_TEXT_CELLS = frozenset(["prompt", "chosen", "rejected", "response"])
_HUB_NAME = re.compile(
    r"hub:(?P<name>[^:@]+)(?:@(?P<revision>[^:]+))?(?::(?P<config>[^:\[\]]+))?"
    r":(?P<split>[^:\[\]]+(?:\[[^\[\]]*\])?)"
)


class Refusal(NamedTuple):
    """Why a row is bad: a `Reason`, and the value that was seen."""

    reason: str
    detail: str


class RefusedError(Exception):
    """A row breaks a rule; raised and caught while one row is read."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal)
        self.refusal = refusal


def stem(path: Path) -> str:
    """The file's name without any suffix that says how to read it."""
    name = path.name
    while Path(name).suffix.lower() in {*_OPENERS, *_READERS}:
        name = Path(name).stem
    return name


def is_known_kind(path: Path) -> bool:
    """Whether rows can be read from a file of this name."""
    *_, before, last = "", "", *(suffix.lower() for suffix in path.suffixes)
    return last in _READERS or (last in _OPENERS and before in _READERS and before != ".parquet")


def find_files(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """The readable files below a folder that match the first pattern that matches any."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and is_known_kind(path))
    # "*" crosses slashes
    names = [path.relative_to(folder).as_posix().lower() for path in files]
    for pattern in patterns:
        matches = [f for f, n in zip(files, names, strict=True) if fnmatch(n, pattern.lower())]
        if matches:
            return matches
    return []


def check_file(path: Path) -> None:
    """Raise DataError for a path that no rows can be read from."""
    if not os.path.exists(path):  # raises nothing for an impossible name
        place = str(path)[:300]
        raise DataError(f"{place}: no such file; a hub data set is written hub:name[:config]:split")
    if path.is_dir():
        raise DataError(f"{path} is a directory; name the files in it one by one")
    if not path.is_file():
        raise DataError(f"{path} is a pipe or a device; write its rows to a file and name that")
    if not is_known_kind(path):
        kinds = ", ".join([*_READERS, *_OPENERS])
        raise DataError(f"{path}: unknown kind of file; allowed are {kinds} (of text)")


def read_file(path: Path) -> NumberedRows:
    """(row number, row or `Refusal`) of every row of a file, in order."""
    check_file(path)
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() not in _OPENERS]
    number = -1
    try:
        for number, row in _READERS[suffixes[-1]](path):
            yield number, row
    except UnicodeDecodeError as error:
        reason = f"{error.reason} near row {number + 1}"
        raise DataError(f"{path} is not UTF-8 text ({reason}); save it as UTF-8") from error
    except (OSError, EOFError, zlib.error, lzma.LZMAError, csv.Error) as error:
        raise DataError(f"{path} cannot be read after row {number}: {error}") from error


def _open_text(path: Path, newline: str = "\n") -> io.TextIOWrapper:
    opener = _OPENERS.get(path.suffix.lower(), Path.open)
    return io.TextIOWrapper(opener(path, "rb"), encoding="utf-8-sig", newline=newline)


def _read_jsonl(path: Path) -> NumberedRows:
    with _open_text(path) as lines:
        for number, line in enumerate(lines):
            if line.strip():
                yield number, _decode(line)


def _decode(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return Refusal("unreadable row", f"not JSON: {error}: {show(text)}")


def _read_json(path: Path) -> NumberedRows:
    with _open_text(path) as stream:
        text = stream.read()
    content = _decode(text) if text.strip() else []
    if isinstance(content, Refusal):
        hint = "name it .jsonl if it has one object per line"
        raise DataError(f"{path} is {content.detail}; {hint}")
    if not isinstance(content, list):
        raise DataError(f"{path} must hold a list of rows, got {show(content)}")
    yield from enumerate(content)


def _read_csv(path: Path) -> NumberedRows:
    csv.field_size_limit(2**31 - 1)  # rows have their own limit, not csv's 128 KiB
    with _open_text(path, newline="") as stream:
        # strict: a quote that never closes would swallow the rows after it
        reader = csv.DictReader(stream, strict=True)
        names = reader.fieldnames or []
        if len(set(names)) < len(names):
            raise DataError(f"{path} needs a first line of distinct column names: {names}")
        for number, cells in enumerate(reader):
            yield number, _csv_row(cells)


def _csv_row(cells: dict[Any, Any]) -> object:
    if None in cells or None in cells.values():  # how DictReader marks too many, or too few
        return Refusal("unreadable row", "its number of cells differs from the header's")
    row = {}
    for column, cell in cells.items():
        if cell and column in _JSON_CELLS:
            row[column] = _decode(cell.lower() if column == "tie" else cell)
        elif cell or column in _TEXT_CELLS:  # an empty text is reported as empty, not as missing
            row[column] = cell
    return next((value for value in row.values() if isinstance(value, Refusal)), row)


def _read_parquet(path: Path) -> NumberedRows:
    import pyarrow as pa  # noqa: PLC0415  (0.2 s, and only for this kind of file)
    import pyarrow.parquet as pq  # noqa: PLC0415

    number = 0
    try:
        with pq.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=1024):
                for row in table_rows(batch):
                    yield number, row
                    number += 1
    except pa.ArrowException as error:
        raise DataError(f"{path} is not readable as Parquet: {error}") from error


def table_rows(batch: Any) -> list[dict[str, Any]]:
    """The rows of a pyarrow table or batch; a date that Python cannot represent is a number."""
    try:
        return cast("list[dict[str, Any]]", batch.to_pylist())
    except (OverflowError, ValueError):  # a date or duration out of Python's range, in any column
        columns = [[_python_value(value) for value in column] for column in batch.columns]
        names = batch.schema.names
        return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def _python_value(value: Any) -> Any:
    try:
        return value.as_py()
    except (OverflowError, ValueError):
        return getattr(value, "value", None)  # as stored: a number of days, microseconds, ...


_READERS: dict[str, Callable[[Path], NumberedRows]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


@dataclass(frozen=True, slots=True)
class HubSet:
    """One split of a data set on the Hugging Face hub."""

    name: str
    split: str = "train"
    config: str | None = None
    folder: str | None = None
    """The folder in the repository, if it has several that are not configs."""
    file: str | None = None  # the JSON file in the repository, if only a loading script names it
    revision: str | None = None

    def __str__(self) -> str:
        within = self.config or self.folder
        return f"hub:{self.name}{f':{within}' if within else ''}:{self.split}"


def parse_hub(location: str) -> HubSet:
    """The data set that "hub:name[@revision][:config]:split" names."""
    match = _HUB_NAME.fullmatch(location)
    if match is None:
        raise DataError(f"{location[:200]!r} is not of the form hub:name[@revision][:config]:split")
    return HubSet(match["name"], match["split"], match["config"], revision=match["revision"])


def read_hub(hub: HubSet, *, stream: bool = False) -> NumberedRows:
    """(row number, row) of every row, in order. With `stream`, rows are fetched as they are read instead of
    downloading the set first, unless a slice of a split is requested."""
    import datasets  # noqa: PLC0415  (1.4 s)

    options: dict[str, Any] = {"streaming": True} if stream and "[" not in hub.split else {}
    try:
        if hub.file is not None:
            url = f"hf://datasets/{hub.name}/{hub.file}"
            table = datasets.load_dataset("json", data_files=url, split="train", **options)
        else:
            options |= {"revision": hub.revision, "split": hub.split}
            options |= {} if hub.folder is None else {"data_dir": hub.folder}
            table = datasets.load_dataset(hub.name, hub.config, **options)
        yield from enumerate(table)
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(f"{hub} cannot be loaded: {error}") from error


def list_of(value: object, column: str) -> list[Any]:
    """The value of a column, which must be a list."""
    if not isinstance(value, list | tuple):
        refuse("not a string", f"`{column}` must be a list, got {show(value)}")
    return list(value)


def as_number(value: object, column: str, reason: Reason = "bad number") -> float:
    """A number up to MAX_NUMBER; text and booleans are refused, whatever they look like."""
    try:
        number = float(value) if isinstance(value, Real) else math.nan
    except OverflowError:  # an integer above 1e308
        number = math.inf
    if isinstance(value, bool) or not abs(number) <= MAX_NUMBER:
        refuse(
            reason, f"`{column}` must be a finite number up to {MAX_NUMBER:g}, got {show(value)}"
        )
    return number


def check_text(text: str, name: str) -> None:
    """Refuse text that is too long, or that no UTF-8 file and no tokenizer can hold."""
    if len(text) > MAX_CHARS:
        refuse("too long", f"{name} has {len(text):,} characters, the limit is {MAX_CHARS:,}")
    # lone surrogates, which no encoding has, and NUL, which C strings end at
    if bad := re.search("[\ud800-\udfff\0]", text):
        refuse("unusable character", f"{name} has {bad[0]!r} at character {bad.start()}")


def refuse(reason: Reason, detail: str) -> NoReturn:
    """Raise `RefusedError`."""
    raise RefusedError(Refusal(reason, detail))


def show(value: object) -> str:
    """A short, safe `repr`: cut in width and depth, lone surrogates escaped."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother = 3, 60, 60
    return short.repr(value)


def cell_of(row: RawRow, column: str) -> Any:
    """The value in a column, whatever it is."""
    if column not in row:
        refuse("missing column", f"no `{column}`; {columns_of(row)}")
    return row[column]


def columns_of(row: RawRow) -> str:
    """The names of a row's columns, for a message."""
    return f"columns: {show([str(name)[:40] for name in row])}"
