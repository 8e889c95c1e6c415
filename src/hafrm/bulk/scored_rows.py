"""Rows to token ids, to scores, and back into JSON lines or Parquet beside the original columns.

`encode_rows` needs only the tokenizer and `score_rows` the model, so one shard can be encoded while another
is scored. A row that cannot be scored keeps its place and does not affect others.
"""

import gzip
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from hafrm.bulk.shards import ShardRows
from hafrm.data.encoding import Encoder
from hafrm.data.parse import Refusal, parse_row
from hafrm.errors import DataError
from hafrm.preferences import Group, TokenizedGroup
from hafrm.progress import OnProgress, no_progress
from hafrm.scoring.reward_model import RewardModel

RowScores = tuple[float, ...] | Refusal  # of a row's responses, in order, or why there are none
# the score columns of a row, by its shape, and the one that says why it has no score
PAIR: tuple[str, ...] = ("chosen_reward", "rejected_reward")
LIST, SINGLE, ERROR = ("rewards",), ("reward",), "error"


class EncodedRows(NamedTuple):
    """Rows ready for the model."""

    rows: list[tuple[str, ...] | Refusal]  # the responses in order, or why they cannot be scored
    groups: list[TokenizedGroup]  # one for each row that can be scored, with its distinct responses


def encode_rows(encoder: Encoder, rows: ShardRows) -> EncodedRows:
    """The rows as token ids; one that cannot be read or rendered, or is too long, is a refusal."""
    parsed = [
        row if isinstance(row, Refusal) else parse_row(row, need_comparisons=False)
        for row in rows.values
    ]
    groups = [
        Group(f"row {number}", row.prompt, tuple(dict.fromkeys(row.responses)))
        for number, row in zip(rows.numbers, parsed, strict=True)
        if not isinstance(row, Refusal)
    ]
    encoded, refused = _encode(encoder, groups)
    responses = [
        row if isinstance(row, Refusal) else refused.get(f"row {number}", row.responses)
        for number, row in zip(rows.numbers, parsed, strict=True)
    ]
    return EncodedRows(responses, encoded)


def _encode(
    encoder: Encoder, groups: Sequence[Group]
) -> tuple[list[TokenizedGroup], dict[str, Refusal]]:
    try:
        encoded, _ = encoder.encode(groups)
    except DataError as error:  # one group fails the whole list: halve it until that group is alone
        if len(groups) == 1:
            return [], {groups[0].id: Refusal("not encodable", str(error))}
        middle = len(groups) // 2
        left, right = (_encode(encoder, half) for half in (groups[:middle], groups[middle:]))
        return left[0] + right[0], left[1] | right[1]
    fitting = {group.id for group in encoded}
    limit = encoder.lengths.max_length
    detail = f"prompt and response have more than {limit:,} tokens, which is the limit"
    return encoded, {g.id: Refusal("too long", detail) for g in groups if g.id not in fitting}


def score_rows(
    model: RewardModel, encoded: EncodedRows, on_progress: OnProgress = no_progress
) -> list[RowScores]:
    """The scores of each row; `on_progress` counts distinct responses."""
    scores = iter(model.score_encoded(encoded.groups, on_progress).tolist())
    result: list[RowScores] = []
    for row in encoded.rows:
        if isinstance(row, Refusal):
            result.append(row)
        else:  # one score for each distinct response, in the order of `encode_rows`
            score_of = {text: next(scores) for text in dict.fromkeys(row)}
            result.append(tuple(score_of[text] for text in row))
    return result


def render_shard(rows: ShardRows, scores: Sequence[RowScores], *, is_packed: bool) -> bytes:
    """The shard's output file: every row with its scores, or with null and an `error`."""
    if rows.table is not None:
        return _render_table(rows, scores)
    lines = "".join(map(_line, rows.values, scores)).encode()
    # without a time in the header, so that the same rows are the same bytes
    return gzip.compress(lines, mtime=0) if is_packed else lines


def _line(row: object, scores: RowScores) -> str:
    columns = dict(row) if isinstance(row, Mapping) else {}
    columns |= _score_columns(columns, scores)
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


def _score_columns(row: Mapping[str, Any], scores: RowScores) -> dict[str, Any]:
    """The columns that a row gets, by its shape as the reader sees it; null where it has no score."""
    columns = {name for name, value in row.items() if value is not None}
    is_pair = columns & {"chosen", "rejected"}
    names = PAIR if is_pair else LIST if columns & {"completions", "responses"} else SINGLE
    if isinstance(scores, Refusal):
        return dict.fromkeys(names)
    return {LIST[0]: list(scores)} if names == LIST else dict(zip(names, scores, strict=True))


def _render_table(rows: ShardRows, scores: Sequence[RowScores]) -> bytes:
    import pyarrow as pa  # noqa: PLC0415
    import pyarrow.parquet as pq  # noqa: PLC0415

    table = rows.table
    # All shards of a file must have the same columns, whatever rows they hold.
    before = set(table.column_names)
    names = PAIR if before & {"chosen", "rejected"} else ()
    names += LIST if before & {"responses", "completions"} else ()
    names += SINGLE if "response" in before or not names else ()
    columns = [_score_columns(dict(row), s) for row, s in zip(rows.values, scores, strict=True)]  # type: ignore[call-overload]
    kinds = {name: pa.list_(pa.float32()) if name in LIST else pa.float32() for name in names}
    added = {name: pa.array([row.get(name) for row in columns], kinds[name]) for name in names}
    added[ERROR] = pa.array([_error(row) for row in scores], pa.string())
    table = table.drop_columns([name for name in added if name in before])  # of an earlier scoring
    for name, column in added.items():
        table = table.append_column(name, column)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return bytes(sink.getvalue())
