"""Shards on disk: rows out of JSON lines and Parquet, and the same rows with their scores back in.

A Parquet file keeps its columns and their types, since its rows are never rebuilt: columns are added
to the table as it was read. Everything else becomes one JSON object for each row. pyarrow is imported
only for Parquet.
"""

import gzip
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from hafrm.data.reader import iter_rows, parse_source
from hafrm.data.values import Refusal
from hafrm.errors import DataError
from hafrm.scoring.inputs import PACKED_JSONL, PARQUET, Shard, is_table
from hafrm.scoring.row_scores import LIST, PAIR, SINGLE, RowScores, score_columns

if TYPE_CHECKING:
    import pyarrow as pa

ERROR = "error"
"""The column that says why a row has no score."""
_BATCH = 1024
"""Parquet rows decoded at a time."""


@dataclass(frozen=True)
class Rows:
    """The rows of a shard, as read."""

    numbers: Sequence[int]
    """Counted from 0 in the whole source: the line of a JSON-lines file, else the record."""
    values: Sequence[object]
    """A mapping for each row, or why the row cannot be read."""
    table: "pa.Table | None" = None
    """The same rows as Parquet has them."""


def read_shards(shards: Sequence[Shard]) -> Iterator[tuple[Shard, Rows]]:
    """The shards with their rows, in order; each source is read once from its start.

    Raises DataError for a source that is damaged, or that ends before its shards do.
    """
    for source in dict.fromkeys(shard.source for shard in shards):
        mine = [shard for shard in shards if shard.source == source]
        spans = [(shard.start, shard.stop) for shard in mine]
        table = is_table(parse_source(source))
        blocks = _read_table(source, spans) if table else _read_rows(source, spans)
        for shard, rows in zip(mine, blocks, strict=True):
            if len(rows.values) != shard.stop - shard.start:
                raise DataError(f"{source} has fewer rows than it had when this job began")
            yield shard, rows


def render(rows: Rows, scores: Sequence[RowScores], suffix: str) -> bytes:
    """The shard's output file: every row in its place, with its scores or null and an `error`."""
    if suffix == PARQUET:
        return _render_table(rows, scores)
    lines = "".join(map(_line, rows.values, scores)).encode()
    return gzip.compress(lines, mtime=0) if suffix == PACKED_JSONL else lines


def join(parts: Sequence[Path], out: BinaryIO, suffix: str) -> None:
    """Write all parts to `out`, one behind the other, holding one of them at a time."""
    if suffix == PARQUET:
        _join_tables(parts, out)
        return
    for part in parts:  # packed ones too: several gzip members in a row are one gzip file
        with part.open("rb") as file:
            shutil.copyfileobj(file, out)


def _read_rows(source: str, spans: Sequence[tuple[int, int]]) -> Iterator[Rows]:
    rows, at = iter_rows(parse_source(source)), 0
    for start, stop in spans:
        block = list(islice(rows, start - at, stop - at))
        at = stop
        yield Rows([number for number, _ in block], [row for _, row in block])


def _read_table(source: str, spans: Sequence[tuple[int, int]]) -> Iterator[Rows]:
    import pyarrow as pa  # noqa: PLC0415
    import pyarrow.parquet as pq  # noqa: PLC0415

    try:
        with pq.ParquetFile(parse_source(source).location) as file:
            batches = _batches(file, spans[0][0])
            at, batch = next(batches)
            for start, stop in spans:
                parts = []
                while batch is not None and at < stop:
                    low, high = max(start - at, 0), min(stop - at, len(batch))
                    if low < high:
                        parts.append(batch.slice(low, high - low))
                    if at + len(batch) > stop:
                        break
                    at, batch = next(batches)
                table = pa.Table.from_batches(parts, schema=file.schema_arrow)
                yield Rows(range(start, stop), table.to_pylist(), table)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{source} cannot be read as Parquet: {error}") from error


def _batches(file: Any, start: int) -> Iterator[tuple[int, Any]]:
    """Batches with the number of their first row, from the row group that holds row `start`; then None."""
    at = group = 0
    while group < file.num_row_groups and at + file.metadata.row_group(group).num_rows <= start:
        at += file.metadata.row_group(group).num_rows
        group += 1
    groups = list(range(group, file.num_row_groups))
    for batch in file.iter_batches(batch_size=_BATCH, row_groups=groups) if groups else ():
        yield at, batch
        at += len(batch)
    yield at, None


def _line(row: object, scores: RowScores) -> str:
    kept = dict(row) if isinstance(row, Mapping) else {}
    kept |= score_columns(kept, scores)
    if isinstance(scores, Refusal):
        kept[ERROR] = f"{scores.reason}: {scores.detail}"
    elif ERROR in kept:
        kept[ERROR] = None  # of an earlier scoring of these rows
    line = json.dumps(kept, ensure_ascii=False, default=str)
    try:
        line.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can only hold escaped
        line = json.dumps(kept, default=str)
    return line + "\n"


def add_scores(
    table: "pa.Table", values: Sequence[object], scores: Sequence[RowScores]
) -> "pa.Table":
    """The table with its score columns and `error`; `values` are its rows as mappings."""
    import pyarrow as pa  # noqa: PLC0415

    columns = [
        score_columns(row, given)
        for row, given in zip(values, scores, strict=True)
        if isinstance(row, Mapping)
    ]
    added: dict[str, Any] = {
        name: pa.array([row.get(name) for row in columns], kind)
        for name, kind in _kinds(table.column_names).items()
    }
    added[ERROR] = pa.array(
        [f"{s.reason}: {s.detail}" if isinstance(s, Refusal) else None for s in scores], pa.string()
    )
    for name, column in added.items():
        if name in table.column_names:  # of an earlier scoring of these rows
            table = table.drop_columns([name])
        table = table.append_column(name, column)
    return table


def _render_table(rows: Rows, scores: Sequence[RowScores]) -> bytes:
    import pyarrow as pa  # noqa: PLC0415
    import pyarrow.parquet as pq  # noqa: PLC0415

    assert rows.table is not None
    sink = pa.BufferOutputStream()
    pq.write_table(add_scores(rows.table, rows.values, scores), sink)
    return bytes(sink.getvalue())


def _kinds(columns: Sequence[str]) -> dict[str, "pa.DataType"]:
    """The score columns of a table and their types: by its columns, so that all its shards agree."""
    import pyarrow as pa  # noqa: PLC0415

    names: tuple[str, ...] = ()
    if {"chosen", "rejected"} & set(columns):
        names += PAIR
    if {"responses", "completions"} & set(columns):
        names += LIST
    if "response" in columns or not names:
        names += SINGLE
    return {name: pa.list_(pa.float32()) if name in LIST else pa.float32() for name in names}


def _join_tables(parts: Sequence[Path], out: BinaryIO) -> None:
    import pyarrow.parquet as pq  # noqa: PLC0415

    with pq.ParquetWriter(out, pq.read_schema(parts[0])) as writer:
        for part in parts:
            writer.write_table(pq.read_table(part))
