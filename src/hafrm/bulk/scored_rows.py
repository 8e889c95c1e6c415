"""Rows to token ids, to scores, and back into JSON lines or Parquet beside the original columns.

`encode_rows` needs only the tokenizer and `score_rows` the model, so one shard can be encoded while another
is scored. A row that cannot be scored keeps its place and does not affect others. A Parquet table keeps its
columns and their types, because columns are added to it as it was read; other rows become JSON objects.
"""

import gzip
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from hafrm.bulk.shards import PACKED_JSONL, PARQUET, ShardRows
from hafrm.data.encoding import Encoder
from hafrm.data.parse import parse_row
from hafrm.data.values import Refusal
from hafrm.errors import DataError
from hafrm.preferences import Group, TokenizedGroup
from hafrm.progress import OnProgress, no_progress
from hafrm.scoring.forward import first_responses
from hafrm.scoring.reward_model import RewardModel

if TYPE_CHECKING:
    import pyarrow as pa

RowScores = tuple[float, ...] | Refusal
"""The scores of a row's responses, in the row's order, or why it was not scored."""
PAIR, LIST, SINGLE = ("chosen_reward", "rejected_reward"), ("rewards",), ("reward",)
"""The score columns of a row, by its shape."""
ERROR = "error"
"""The column that says why a row has no score."""


@dataclass(frozen=True)
class EncodedRows:
    """Rows ready for the model."""

    rows: tuple[tuple[str, ...] | Refusal, ...]
    """Each row's responses in its order, or why it cannot be scored."""
    groups: tuple[TokenizedGroup, ...]
    """One for each row that can be scored, with its distinct responses."""
    num_cut: int
    """Prompts and responses that were cut to fit."""


def encode_rows(encoder: Encoder, rows: Sequence[object], numbers: Sequence[int]) -> EncodedRows:
    """The rows as token ids; one that cannot be read or rendered, or is too long, is a refusal.

    Refusals name rows by `numbers`. Raises ModelError for a chat template that drops every response.
    """
    parsed = [
        row if isinstance(row, Refusal) else parse_row(row, need_comparisons=False) for row in rows
    ]
    groups = [
        Group(f"row {number}", row.prompt, tuple(dict.fromkeys(row.responses)))
        for number, row in zip(numbers, parsed, strict=True)
        if not isinstance(row, Refusal)
    ]
    encoded, refused, num_cut = _encode(encoder, groups)
    return EncodedRows(
        rows=tuple(
            row if isinstance(row, Refusal) else refused.get(f"row {number}", row.responses)
            for number, row in zip(numbers, parsed, strict=True)
        ),
        groups=tuple(encoded),
        num_cut=num_cut,
    )


def score_rows(
    model: RewardModel, encoded: EncodedRows, on_progress: OnProgress = no_progress
) -> list[RowScores]:
    """The scores of each row; `on_progress` counts distinct responses.

    Raises NumericsError for a score that is not finite.
    """
    scores = model.score_encoded(encoded.groups, on_progress).tolist()
    first = iter(first_responses(encoded.groups).tolist())
    result: list[RowScores] = []
    for row in encoded.rows:
        if isinstance(row, Refusal):
            result.append(row)
            continue
        start = next(first)
        place = {text: start + k for k, text in enumerate(dict.fromkeys(row))}
        result.append(tuple(scores[place[text]] for text in row))
    return result


def _encode(
    encoder: Encoder, groups: Sequence[Group]
) -> tuple[list[TokenizedGroup], dict[str, Refusal], int]:
    """Tokenized groups, refusals by id, and how many prompts and responses were cut."""
    try:
        encoded, report = encoder.encode(groups)
    except DataError as error:  # one group fails the whole list: halve it until that group is alone
        if len(groups) == 1:
            return [], {groups[0].id: Refusal("not encodable", str(error))}, 0
        middle = len(groups) // 2
        left, right = (_encode(encoder, half) for half in (groups[:middle], groups[middle:]))
        return left[0] + right[0], left[1] | right[1], left[2] + right[2]
    fitting = {group.id for group in encoded}
    limit = encoder.lengths.max_length
    detail = f"prompt and response have more than {limit:,} tokens, which is the limit"
    refused = {group.id: Refusal("too long", detail) for group in groups if group.id not in fitting}
    return encoded, refused, report.prompts_cut + report.responses_cut


def score_columns(row: Mapping[str, Any], scores: RowScores) -> dict[str, Any]:
    """The columns that a row gets, by its shape as the reader sees it; null where it has no score."""
    names = _shape(row)
    if isinstance(scores, Refusal):
        return dict.fromkeys(names)
    return {LIST[0]: list(scores)} if names == LIST else dict(zip(names, scores, strict=True))


def _shape(row: Mapping[str, Any]) -> tuple[str, ...]:
    if row.get("chosen") is not None or row.get("rejected") is not None:
        return PAIR
    several = row.get("completions") is not None or row.get("responses") is not None
    return LIST if several else SINGLE


def render_shard(rows: ShardRows, scores: Sequence[RowScores], suffix: str) -> bytes:
    """The shard's output file: every row with its scores, or with null and an `error`."""
    if suffix == PARQUET:
        return _render_table(rows, scores)
    lines = "".join(map(_line, rows.values, scores)).encode()
    return gzip.compress(lines, mtime=0) if suffix == PACKED_JSONL else lines


def join_files(parts: Sequence[Path], out: BinaryIO, suffix: str) -> None:
    """Write all parts to `out`, one after another; one of them is in memory at a time."""
    if suffix == PARQUET:
        _join_tables(parts, out)
        return
    for part in parts:  # compressed ones too: several gzip members are one gzip file
        with part.open("rb") as file:
            shutil.copyfileobj(file, out)


def _line(row: object, scores: RowScores) -> str:
    columns = dict(row) if isinstance(row, Mapping) else {}
    columns |= score_columns(columns, scores)
    if isinstance(scores, Refusal):
        columns[ERROR] = f"{scores.reason}: {scores.detail}"
    elif ERROR in columns:
        columns[ERROR] = None  # it is from an earlier scoring of these rows
    line = json.dumps(columns, ensure_ascii=False, default=str)
    try:
        line.encode()
    except UnicodeEncodeError:  # half a surrogate pair: JSON can hold it only escaped
        line = json.dumps(columns, default=str)
    return line + "\n"


def add_scores(
    table: "pa.Table", values: Sequence[object], scores: Sequence[RowScores]
) -> "pa.Table":
    """The table with its score columns and `error`; `values` are its rows as mappings."""
    import pyarrow as pa  # noqa: PLC0415

    columns = [
        score_columns(row, row_scores)
        for row, row_scores in zip(values, scores, strict=True)
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
        if name in table.column_names:  # it is from an earlier scoring
            table = table.drop_columns([name])
        table = table.append_column(name, column)
    return table


def _render_table(rows: ShardRows, scores: Sequence[RowScores]) -> bytes:
    import pyarrow as pa  # noqa: PLC0415
    import pyarrow.parquet as pq  # noqa: PLC0415

    assert rows.table is not None
    sink = pa.BufferOutputStream()
    pq.write_table(add_scores(rows.table, rows.values, scores), sink)
    return bytes(sink.getvalue())


def _kinds(columns: Sequence[str]) -> dict[str, "pa.DataType"]:
    """Types of a table's score columns; they depend only on its other columns, so all shards agree."""
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
