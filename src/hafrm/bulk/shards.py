"""Shards of rows: inputs counted, identified by content, cut and read, and rows written with scores."""

import gzip
import json
import logging
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice, product
from pathlib import Path
from typing import Any

from hafrm.atomic import fingerprint
from hafrm.data.files import Refusal, is_known_kind, table_rows
from hafrm.data.reader import Source, iter_rows, parse_source
from hafrm.errors import DataError

log = logging.getLogger("hafrm")

ROWS_PER_SHARD = 4096  # enough to fill packed sequences with inputs of similar length
RowScores = Mapping[str, Sequence[Any]] | Refusal
"""The scores of a row's responses, in order, by output; or why there are none."""
ERROR = "error"  # the column that says why a row has no score
# the column of an output in a row with one response; tokens: a list of numbers
NAMES = {"reward": "reward", "implicit": "implicit_reward", "tokens": "token_rewards"}


@dataclass(frozen=True)
class Input:
    """One source, and everything about it that must be the same when a job resumes."""

    source: str  # as given by the user: a path, perhaps with a selection, or hub:name:split
    name: str  # of its outputs, without number and ending
    num_rows: int
    digest: str  # of the file's content; a hub set is identified by its name


@dataclass(frozen=True)
class Shard:
    """The selected rows [start, start + num_rows) of an input, and their output file."""

    file: str
    source: str
    start: int
    num_rows: int


@dataclass(frozen=True)
class ShardRows:
    """The rows of a shard, as read."""

    numbers: Sequence[int]
    """Row numbers in the whole source, from 0: lines of a JSON-lines file, else records."""
    values: Sequence[object]  # a mapping for each row, or why the row cannot be read
    table: Any = None  # the same rows as a pyarrow table, if the source is a Parquet file


def identify(sources: Sequence[str]) -> tuple[Input, ...]:
    """The inputs that paths, folders and hub sets stand for; DataError for one that cannot be read."""
    inputs = []
    for source in [source for item in sources for source in _expand(item)]:
        if source.startswith("set:"):
            raise DataError(f"{source} is a set of preferences; score a file, or hub:name:split")
        parsed = parse_source(source)
        place = parsed.location
        num_rows = sum(1 for _ in iter_rows(parsed))  # reads all of it: a damaged file stops here
        digest = place if place.startswith("hub:") else fingerprint(Path(place))
        inputs.append(Input(source, parsed.name, num_rows, digest))
    return tuple(inputs)


def _expand(source: str) -> list[str]:
    """The source itself, or the files of a folder by name; hidden and `_` names are not data."""
    folder = Path(source)
    if not folder.is_dir():
        return [source]
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.name[0] not in "._")
    readable = [file for file in files if is_known_kind(file)]
    if not readable:
        raise DataError(f"{folder} holds no file that rows can be read from")
    for file in files:
        if file not in readable:
            log.warning("%s is not scored: rows cannot be read from this kind of file", file)
    return [str(file) for file in readable]


def is_table(source: Source) -> bool:
    """Whether the source is a whole Parquet file, whose columns keep their types."""
    whole = not (source.where or source.columns or source.ignore) and source.limit is None
    return whole and Path(source.location).suffix.lower() == ".parquet"


def cut_into_shards(inputs: Sequence[Input], rows_per_shard: int) -> tuple[Shard, ...]:
    """The shards of all inputs, in order; DataError when two outputs would have the same name."""
    shards: list[Shard] = []
    for item in inputs:
        parsed = parse_source(item.source)
        is_packed = Path(parsed.location).suffix.lower() in {".gz", ".xz"}
        suffix = ".parquet" if is_table(parsed) else ".jsonl.gz" if is_packed else ".jsonl"
        total = max(1, -(-item.num_rows // rows_per_shard))  # one for an empty input too
        for k in range(total):
            name = item.name if total == 1 else f"{item.name}-{k:05d}-of-{total:05d}"
            start = k * rows_per_shard
            num_rows = min(rows_per_shard, item.num_rows - start)
            shards.append(Shard(name + suffix, item.source, start, num_rows))
    name, number = Counter(shard.file for shard in shards).most_common(1)[0]
    if number > 1:
        raise DataError(f"two outputs would be called {name}: give those of one name a --out each")
    return tuple(shards)


def read_shards(shards: Sequence[Shard], rows_per_shard: int) -> Iterator[ShardRows]:
    """The rows of shards in the order of `cut_into_shards`, some of which may be left out."""
    for name, of_source in groupby(shards, key=lambda shard: shard.source):
        source, index = parse_source(name), 0
        blocks = (_table_blocks if is_table(source) else _row_blocks)(source, rows_per_shard)
        for shard in of_source:
            # other shards' blocks are read and skipped, because JSON lines have no index
            skip = shard.start // rows_per_shard - index
            index += skip + 1
            rows = next(islice(blocks, skip, None), None)
            if rows is None or len(rows.values) != shard.num_rows:
                raise DataError(f"{name} has fewer rows than when this job began")
            yield rows


def _row_blocks(source: Source, size: int) -> Iterator[ShardRows]:
    rows, is_first = iter(iter_rows(source)), True
    while (block := list(islice(rows, size))) or is_first:  # an empty source is one empty block
        yield ShardRows([number for number, _ in block], [row for _, row in block])
        is_first = False


def _table_blocks(source: Source, size: int) -> Iterator[ShardRows]:
    import pyarrow as pa  # noqa: PLC0415
    import pyarrow.parquet as pq  # noqa: PLC0415

    file = pq.ParquetFile(source.location)
    rest, start = file.schema_arrow.empty_table(), 0
    for batch in file.iter_batches(batch_size=size):  # at most `size` rows: a row group may end
        rest = pa.concat_tables([rest, pa.Table.from_batches([batch])])
        if len(rest) >= size:
            block, rest = rest.slice(0, size), rest.slice(size)
            yield ShardRows(range(start, start + size), table_rows(block), block)
            start += size
    if len(rest) or start == 0:  # an empty table is one empty block
        yield ShardRows(range(start, start + len(rest)), table_rows(rest), rest)


def render_shard(
    rows: ShardRows, scores: Sequence[RowScores], outputs: Sequence[str], *, is_packed: bool
) -> bytes:
    """The shard's output file: every row with its scores, or with null and an `error`."""
    if rows.table is not None:
        return _render_table(rows, scores, outputs)
    lines = "".join(_line(*row, outputs) for row in zip(rows.values, scores, strict=True)).encode()
    # without a time in the header, so that the same rows give the same bytes
    return gzip.compress(lines, mtime=0) if is_packed else lines


def _line(row: object, scores: RowScores, outputs: Sequence[str]) -> str:
    columns = dict(row) if isinstance(row, Mapping) else {}
    columns |= _score_columns(columns, scores, outputs)
    if isinstance(scores, Refusal) or ERROR in columns:  # perhaps of an earlier scoring
        columns[ERROR] = _error(scores)
    line = json.dumps(columns, ensure_ascii=False, default=str)
    try:
        line.encode()
    except UnicodeEncodeError:  # half a surrogate pair: JSON can hold it only escaped
        line = json.dumps(columns, default=str)
    return line + "\n"


def _error(scores: RowScores) -> str | None:
    return f"{scores.reason}: {scores.detail}" if isinstance(scores, Refusal) else None


def _score_columns(
    row: Mapping[str, Any], scores: RowScores, outputs: Sequence[str]
) -> dict[str, Any]:
    """The columns that a row gets, by its shape as the reader sees it; null if it has no score."""
    columns = {name for name, value in row.items() if value is not None}
    is_list = not columns & {"chosen", "rejected"} and "responses" in columns
    result: dict[str, Any] = {}
    for output in outputs:
        names = _column_names(columns, output)
        if isinstance(scores, Refusal):
            result |= dict.fromkeys(names)
        else:
            values = [scores[output]] if is_list else scores[output]
            result |= zip(names, values, strict=True)
    return result


def _column_names(columns: Collection[str], output: str) -> tuple[str, ...]:
    name = NAMES[output]
    if {"chosen", "rejected"} & set(columns):
        return f"chosen_{name}", f"rejected_{name}"
    return (f"{name.removesuffix('s')}s" if "responses" in columns else name,)


def _render_table(rows: ShardRows, scores: Sequence[RowScores], outputs: Sequence[str]) -> bytes:
    import pyarrow as pa  # noqa: PLC0415
    import pyarrow.parquet as pq  # noqa: PLC0415

    table = rows.table
    # All shards of a file must have the same columns, whatever rows they hold.
    before = set(table.column_names)
    shapes = [shape for shape in ({"chosen", "rejected"}, {"responses"}) if before & shape]
    shapes += [{"response"}] if "response" in before or not shapes else []
    columns = [
        _score_columns(dict(row), s, outputs)  # type: ignore[call-overload]
        for row, s in zip(rows.values, scores, strict=True)
    ]
    added = {}
    for shape, output in product(shapes, outputs):
        kind = pa.float32() if output != "tokens" else pa.list_(pa.float32())
        kind = pa.list_(kind) if "responses" in shape else kind
        for name in _column_names(shape, output):
            added[name] = pa.array([row.get(name) for row in columns], kind)
    added[ERROR] = pa.array([_error(row) for row in scores], pa.string())
    table = table.drop_columns([name for name in added if name in before])  # of an earlier scoring
    for name, column in added.items():
        table = table.append_column(name, column)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return bytes(sink.getvalue())
