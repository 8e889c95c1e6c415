"""Files of preference data -> numbered raw rows, by their suffix: JSON, JSON lines, CSV, Parquet.

Nothing here knows what a row means. A line that cannot be decoded becomes a `Refusal` in its place,
so that it is counted; a file that cannot be read at all is a `DataError`. Row numbers start at 0 and
are line numbers for JSON lines, record numbers (without the header) otherwise. pyarrow is imported
only when a file needs it.
"""

import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from hafrm.data.values import Refusal, show
from hafrm.errors import DataError

Numbered = Iterator[tuple[int, object]]

_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
_TEXT_CELLS = frozenset({"prompt", "chosen", "rejected", "response"})
_NUMBER_CELLS = frozenset({"margin", "weight"})
_JSON_CELLS = frozenset(
    {"context", "responses", "completions", "ranks", "ranking", "scores", "ratings", "votes"}
)
_MESSAGES = re.compile(r"\s*\[\s*\{\s*[\"'](role|content)[\"']")


def stem(path: Path) -> str:
    """The file's name without any suffix that says how to read it."""
    name = path.name
    while Path(name).suffix.lower() in {*_OPENERS, *_READERS}:
        name = Path(name).stem
    return name


def is_known_kind(path: Path) -> bool:
    """Whether the name is one of a file that rows can be read from."""
    *_, before, last = "", "", *(suffix.lower() for suffix in path.suffixes)
    return last in _READERS or (last in _OPENERS and before in _READERS and before != ".parquet")


def find_files(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """The readable files below a folder that match the first pattern for which there are any.

    A pattern is matched, in lower case, with the path relative to the folder; "*" crosses slashes.
    """
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and (set(map(str.lower, path.suffixes[-2:])) & _READERS.keys())
    )
    for pattern in patterns:
        names = ((path, path.relative_to(folder).as_posix().lower()) for path in files)
        found = [path for path, name in names if fnmatch(name, pattern.lower())]
        if found:
            return found
    return []


def read_file(path: Path) -> Numbered:
    """(row number, row or `Refusal`) of every row of a file, in order.

    Raises `DataError` when it is missing, of an unknown kind, damaged or not UTF-8.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file; a hub data set is written hub:name[:config]:split")
    if path.is_dir():
        raise DataError(f"{path} is a directory; name the files in it one by one")
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes.pop() if suffixes and suffixes[-1] in _OPENERS else ""
    kind = suffixes[-1] if suffixes else ""
    if kind not in _READERS or (packed and kind == ".parquet"):
        raise DataError(
            f"{path}: unknown kind of file; allowed are {', '.join(_READERS)}, "
            f"and the text ones with {' or '.join(_OPENERS)}"
        )
    number = -1
    try:
        for number, row in _READERS[kind](path, packed):
            yield number, row
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text ({error.reason} near row {number + 1}); save it as UTF-8"
        ) from error
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{path} cannot be read after row {number}: {error}") from error


def _open_text(path: Path, packed: str, newline: str) -> io.TextIOWrapper:
    stream = _OPENERS[packed](path, "rb") if packed else path.open("rb")
    return io.TextIOWrapper(stream, encoding="utf-8-sig", newline=newline)


def _read_jsonl(path: Path, packed: str) -> Numbered:
    with _open_text(path, packed, "\n") as lines:
        for number, line in enumerate(lines):
            if line.strip():
                yield number, _decode(line)


def _decode(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return Refusal("unreadable row", f"not JSON: {error}: {show(text)}")


def _read_json(path: Path, packed: str) -> Numbered:
    with _open_text(path, packed, "\n") as stream:
        text = stream.read()
    try:
        content = json.loads(text) if text.strip() else []
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path} is not JSON: {error}; name it .jsonl if it has one object per line"
        ) from error
    rows = content.get("data") if isinstance(content, dict) else content
    if not isinstance(rows, list):
        raise DataError(
            f"{path} must hold a list of rows or {{'data': [...]}}, got {show(content)}"
        )
    yield from enumerate(rows)


def _read_csv(path: Path, packed: str) -> Numbered:
    old_limit = csv.field_size_limit(2**31 - 1)  # rows have their own limit, not csv's 128 KiB
    try:
        with _open_text(path, packed, "") as stream:
            records = _read_records(csv.reader(stream, strict=True), path)
            header = next(records, [])
            if isinstance(header, Refusal) or len(set(header)) < len(header):
                raise DataError(f"{path} needs a first line of distinct column names: {header}")
            for number, cells in enumerate(records):
                yield number, cells if isinstance(cells, Refusal) else _csv_row(header, cells)
    finally:
        csv.field_size_limit(old_limit)


def _read_records(reader: Iterator[list[str]], path: Path) -> Iterator[list[str] | Refusal]:
    last: list[str] = []
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "end of data" in str(error):  # all rows behind the open quote are in this one cell
                raise DataError(
                    f"{path} has a quote that never closes, after {show(last)}"
                ) from error
            yield Refusal("unreadable row", f"not CSV: {error}")
        else:
            if cells:  # not an empty line
                last = cells
                yield cells


def _csv_row(header: list[str], cells: list[str]) -> object:
    if len(cells) != len(header):
        return Refusal("unreadable row", f"{len(cells)} cells, but the header has {len(header)}")
    row: dict[str, object] = {}
    for column, cell in zip(header, cells, strict=True):
        # text columns keep an empty cell, so that it is reported as empty and not as missing
        if cell or column in _TEXT_CELLS:
            row[column] = _csv_value(column, cell)
    return next((value for value in row.values() if isinstance(value, Refusal)), row)


def _csv_value(column: str, cell: str) -> object:
    """The cell as its column wants it: a number, JSON, or text unless it clearly is messages."""
    if column in _NUMBER_CELLS:
        try:
            return float(cell)
        except ValueError:
            return cell
    if column == "tie":
        return {"true": True, "1": True, "false": False, "0": False}.get(cell.lower(), cell)
    return _decode(cell) if column in _JSON_CELLS or _MESSAGES.match(cell) else cell


def _read_parquet(path: Path, packed: str) -> Numbered:
    import pyarrow as pa  # noqa: PLC0415  (0.2 s, and only for this kind of file)
    import pyarrow.parquet as pq  # noqa: PLC0415

    assert not packed
    number = 0
    try:
        with pq.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    yield number, row
                    number += 1
    except pa.ArrowException as error:
        raise DataError(f"{path} is not readable as Parquet: {error}") from error


_READERS: dict[str, Callable[[Path, str], Numbered]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
