"""Rows keep their columns, order and types; scores and reasons are added beside them."""

import gzip
import io
import json
from datetime import datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hafrm.bulk.scored_rows import join_files, render_shard
from hafrm.bulk.shards import Shard, ShardReader
from hafrm.data.values import Refusal
from hafrm.errors import DataError

BAD = Refusal("empty response", "`response` is ' '")


def shards_of(file, spans):
    return [Shard(f"{k}{file.suffix}", str(file), *span) for k, span in enumerate(spans)]


def read_shards(shards):
    reader = ShardReader()
    return [(shard, reader.read(shard)) for shard in shards]


def lines(data: bytes):
    return [json.loads(line) for line in data.decode().splitlines()]


@pytest.fixture
def jsonl(tmp_path):
    rows = [{"prompt": "a", "response": f"é{i}", "id": i} for i in range(7)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "x.jsonl").write_text("\n" + text, encoding="utf-8")  # line 0 is blank
    return tmp_path / "x.jsonl"


@pytest.fixture
def parquet(tmp_path):
    """Row groups of 3, and types that a row of plain objects would lose."""
    table = pa.table(
        {
            "prompt": pa.array([f"p{i}" for i in range(8)]).dictionary_encode(),
            "response": [f"r{i}" for i in range(8)],
            "when": pa.array([i * 1_000_000_001 for i in range(8)], pa.timestamp("ns")),
            "small": pa.array(range(8), pa.int8()),
            "blob": [bytes([255, i]) for i in range(8)],
        },
    )
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=3)
    return tmp_path / "x.parquet"


def test_json_lines_are_read_in_spans_with_their_line_numbers(jsonl):
    spans = [(1, 3), (5, 7)]
    found = list(read_shards(shards_of(jsonl, spans)))
    assert [list(rows.numbers) for _, rows in found] == [[2, 3], [6, 7]]
    assert [[row["id"] for row in rows.values] for _, rows in found] == [[1, 2], [5, 6]]


@pytest.mark.parametrize("spans", [[(0, 8)], [(0, 2), (2, 4), (4, 8)], [(4, 5)], [(1, 3), (7, 8)]])
def test_parquet_is_read_in_spans_across_row_groups(parquet, spans):
    found = list(read_shards(shards_of(parquet, spans)))
    assert [[row["small"] for row in rows.values] for _, rows in found] == [
        list(range(*span)) for span in spans
    ]
    for span, (_, rows) in zip(spans, found, strict=True):
        assert rows.table.equals(pq.read_table(parquet).slice(span[0], span[1] - span[0]))


def test_a_source_that_lost_rows_since_the_plan_is_refused(jsonl, parquet):
    for file in (jsonl, parquet):
        with pytest.raises(DataError, match="fewer rows"):
            list(read_shards(shards_of(file, [(0, 9)])))


def test_json_rows_keep_their_columns_and_bad_ones_their_place(jsonl):
    ((_, rows),) = read_shards(shards_of(jsonl, [(0, 3)]))
    out = lines(render_shard(rows, [(1.5,), BAD, (0.25,)], ".jsonl"))
    assert out[0] == {"prompt": "a", "response": "é0", "id": 0, "reward": 1.5}
    assert out[1]["reward"] is None
    assert out[1]["error"] == "empty response: `response` is ' '"
    assert [row["id"] for row in out] == [0, 1, 2]
    packed = render_shard(rows, [(1.5,), BAD, (0.25,)], ".jsonl.gz")
    assert lines(gzip.decompress(packed)) == out


@pytest.mark.parametrize(
    ("row", "scores", "added"),
    [
        ({"response": "x", "responses": None}, (1.0,), {"reward": 1.0}),
        ({"responses": ["x", "y"], "response": None}, (1.0, 2.0), {"rewards": [1.0, 2.0]}),
        ({"completions": ["x"]}, (1.0,), {"rewards": [1.0]}),
        (
            {"chosen": "x", "rejected": "y"},
            (1.0, 2.0),
            {"chosen_reward": 1.0, "rejected_reward": 2.0},
        ),
        (
            {"chosen": "x", "rejected": " "},
            BAD,
            {"chosen_reward": None, "rejected_reward": None, "error": f"{BAD[0]}: {BAD[1]}"},
        ),
        ({"responses": []}, BAD, {"rewards": None, "error": f"{BAD[0]}: {BAD[1]}"}),
        ({"response": "x", "error": "old", "reward": 9.0}, (1.0,), {"reward": 1.0, "error": None}),
    ],
)
def test_the_shape_of_a_row_decides_its_columns(tmp_path, row, scores, added):
    (tmp_path / "x.jsonl").write_text(json.dumps(row) + "\n")
    ((_, rows),) = read_shards(shards_of(tmp_path / "x.jsonl", [(0, 1)]))
    assert lines(render_shard(rows, [scores], ".jsonl")) == [row | added]


def test_text_that_no_utf8_file_can_hold_stays_readable_json(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"prompt": "a", "response": "\\ud800"}\nnot json\n')
    ((_, rows),) = read_shards(shards_of(tmp_path / "x.jsonl", [(0, 2)]))
    out = lines(render_shard(rows, [BAD, rows.values[1]], ".jsonl"))
    assert out[0]["response"] == "\ud800"
    assert out[1]["reward"] is None
    assert "not JSON" in out[1]["error"]


def test_parquet_keeps_its_types_and_gets_columns_that_all_its_shards_share(parquet):
    parts = list(read_shards(shards_of(parquet, [(0, 4), (4, 8)])))
    tables = []
    for (_, rows), scores in zip(parts, ([(0.1,)] * 4, [BAD] * 4), strict=True):
        tables.append(pq.read_table(io.BytesIO(render_shard(rows, scores, ".parquet"))))
    before = pq.read_table(parquet)
    both = pa.concat_tables(tables)  # raises where schemas differ
    assert both.select(before.column_names).equals(before)
    assert both.column("reward").to_pylist() == [pytest.approx(0.1)] * 4 + [None] * 4
    assert both.column("error").to_pylist() == [None] * 4 + [f"{BAD[0]}: {BAD[1]}"] * 4
    assert both.schema.field("reward").type == pa.float32()


def test_parquet_with_lists_and_pairs_gets_both_kinds_of_columns(tmp_path):
    table = pa.table(
        {
            "prompt": ["a", "a"],
            "responses": [["x", "y"], None],
            "chosen": [None, "x"],
            "rejected": [None, "y"],
            "rewards": [[9.0], [9.0]],
        }
    )
    pq.write_table(table, tmp_path / "x.parquet")
    ((_, rows),) = read_shards(shards_of(tmp_path / "x.parquet", [(0, 2)]))
    out = pq.read_table(io.BytesIO(render_shard(rows, [(1.0, 2.0), (3.0, 4.0)], ".parquet")))
    assert out.column("rewards").to_pylist() == [[1.0, 2.0], None]
    assert out.column("chosen_reward").to_pylist() == [None, 3.0]


def test_parquet_read_as_json_lines_writes_what_json_has_no_word_for_as_text(parquet):
    ((_, rows),) = read_shards(shards_of(parquet, [(0, 1)]))
    (row,) = lines(render_shard(rows, [(1.0,)], ".jsonl"))
    assert datetime.fromisoformat(row["when"]).year == 1970
    assert row["reward"] == 1.0


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
def test_joined_parts_are_one_file_with_all_rows_in_order(parquet, tmp_path, suffix):
    parts = []
    for shard, rows in read_shards(shards_of(parquet, [(0, 3), (3, 8)])):
        part = tmp_path / f"{shard.start}{suffix}"
        part.write_bytes(render_shard(rows, [(0.5,)] * len(rows.values), suffix))
        parts.append(part)
    out = tmp_path / f"joined{suffix}"
    with out.open("wb") as file:
        join_files(parts, file, suffix)
    if suffix == ".parquet":
        found = pq.read_table(out).to_pylist()
    else:
        found = lines(gzip.decompress(out.read_bytes()) if suffix[-1] == "z" else out.read_bytes())
    assert [row["small"] for row in found] == list(range(8))
    assert {row["reward"] for row in found} == {0.5}
