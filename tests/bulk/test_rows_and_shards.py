"""Inputs are counted and identified by content; rows keep their columns, order and types."""

import gzip
import io
import json
from datetime import datetime
from itertools import chain
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hafrm.bulk.shards import Shard, ShardRows, cut_into_shards, identify, read_shards, render_shard
from hafrm.data.files import Refusal
from hafrm.errors import DataError

BAD = Refusal("empty response", "`response` is ' '")
ERROR = {"error": "empty response: `response` is ' '"}
PAIR = ("chosen_reward", "rejected_reward")


def write(file, num=5):
    file.parent.mkdir(exist_ok=True)
    text = "".join(json.dumps({"prompt": "a", "response": str(i)}) + "\n" for i in range(num))
    file.write_bytes(gzip.compress(text.encode()) if file.suffix == ".gz" else text.encode())
    return str(file)


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
        }
    )
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=3)
    return tmp_path / "x.parquet"


def by_output(scores):
    return [s if isinstance(s, Refusal) else {"reward": list(s)} for s in scores]


def lines(rows, scores, *, is_packed=False):
    data = render_shard(rows, by_output(scores), ["reward"], is_packed=is_packed)
    return [
        json.loads(line) for line in (gzip.decompress(data) if is_packed else data).splitlines()
    ]


def test_a_folder_is_its_files_by_name_and_what_is_no_data_is_named(tmp_path, caplog):
    for name in ("b.jsonl", "a.jsonl.gz", "_SUCCESS", ".hidden.jsonl", "notes.md"):
        write(tmp_path / name)
    inputs = identify([str(tmp_path)])
    assert [(item.name, item.num_rows) for item in inputs] == [("a", 5), ("b", 5)]
    assert "notes.md is not scored" in caplog.text
    assert "SUCCESS" not in caplog.text


def test_shards_cover_all_rows_once_and_are_of_their_inputs_kind(tmp_path, parquet):
    """A selection breaks a table; an input without rows still gets an output."""
    sources = [write(tmp_path / "a.jsonl"), write(tmp_path / "b.jsonl.gz", 0)]
    sources += [str(parquet), f"{parquet}#limit=2"]
    a, b, table, selected = sources
    assert cut_into_shards(identify([a, b, table]), 4) == (
        Shard("a-00000-of-00002.jsonl", a, 0, 4),
        Shard("a-00001-of-00002.jsonl", a, 4, 1),
        Shard("b.jsonl.gz", b, 0, 0),
        Shard("x-00000-of-00002.parquet", table, 0, 4),
        Shard("x-00001-of-00002.parquet", table, 4, 4),
    )
    assert cut_into_shards(identify([selected]), 4) == (Shard("x.jsonl", selected, 0, 2),)


def test_a_parquet_source_whose_columns_are_named_or_ignored_is_read_as_rows(tmp_path):
    table = pa.table({"question": ["Say sun."], "tools": ["x"], "response": ["sun"]})
    pq.write_table(table, tmp_path / "q.parquet")
    source = f"{tmp_path / 'q.parquet'}#prompt=question&ignore=tools"
    (shard,) = cut_into_shards(identify([source]), 4)
    assert shard.file == "q.jsonl"
    (rows,) = read_shards([shard], 4)
    assert rows.values == [{"prompt": "Say sun.", "response": "sun"}]
    with pytest.raises(DataError, match="set of preferences"):
        identify([f"set:hh-helpful={tmp_path / 'q.parquet'}"])


def test_damaged_missing_and_repeated_inputs_are_refused_by_name(tmp_path, parquet):
    good = write(tmp_path / "x.jsonl", 3)
    other = write(tmp_path / "x-00000-of-00002.jsonl", 1)
    with pytest.raises(DataError, match=r"would be called x-00000-of-00002\.jsonl"):
        cut_into_shards(identify([good, other]), 2)
    with pytest.raises(DataError, match="no such file"):
        identify([str(tmp_path / "nowhere.jsonl")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no file"):
        identify([str(tmp_path / "empty")])
    torn = Path(write(tmp_path / "torn.jsonl.gz", 500))
    for damaged in (torn, parquet):
        damaged.write_bytes(damaged.read_bytes()[:-60])
        with pytest.raises(DataError, match=damaged.name):
            identify([good, str(damaged)])


@pytest.mark.parametrize("size", [1, 3, 5, 8])
@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_shards_are_read_in_one_pass_all_or_some(tmp_path, parquet, size, kind):
    """Across row groups; JSON lines keep their line numbers, of which the first is blank here."""
    source, first = str(parquet), 0
    if kind == "jsonl":
        text = "".join(json.dumps({"small": i}) + "\n" for i in range(8))
        (tmp_path / "x.jsonl").write_text("\n" + text)
        source, first = str(tmp_path / "x.jsonl"), 1
    shards = cut_into_shards(identify([source]), size)
    wanted = (*shards, *shards[::2], *shards[1::2], *shards[-1:])
    parts = (shards, shards[::2], shards[1::2], shards[-1:])
    for shard, rows in zip(wanted, chain(*(read_shards(p, size) for p in parts)), strict=True):
        span = range(shard.start, shard.start + shard.num_rows)
        assert [row["small"] for row in rows.values] == list(span)
        assert list(rows.numbers) == [first + i for i in span]
        if kind == "parquet":
            assert rows.table.equals(pq.read_table(parquet).slice(shard.start, shard.num_rows))
    with pytest.raises(DataError, match="fewer rows"):
        next(read_shards([Shard("x", source, 0, 99)], size))


@pytest.mark.parametrize(
    ("row", "scores", "added"),
    [
        ({"response": "é", "responses": None}, (1.5,), {"reward": 1.5}),
        ({"responses": ["x", "y"], "response": None}, (1.0, 2.0), {"rewards": [1.0, 2.0]}),
        ({"chosen": "x", "rejected": "y"}, (1.0, 2.0), dict(zip(PAIR, (1.0, 2.0), strict=True))),
        ({"chosen": "x", "rejected": " "}, BAD, dict.fromkeys(PAIR) | ERROR),
        ({"response": "x", "error": "old", "reward": 9.0}, (1.0,), {"reward": 1.0, "error": None}),
        # half a surrogate pair, which no UTF-8 file can hold
        ({"response": "\ud800"}, BAD, {"reward": None} | ERROR),
        (Refusal("unreadable row", "not JSON"), Refusal("unreadable row", "not JSON"), None),
    ],
)
def test_the_shape_of_a_row_decides_its_columns(row, scores, added):
    rows = ShardRows([0], [row])
    expected = (
        {"reward": None, "error": "unreadable row: not JSON"} if added is None else row | added
    )
    assert lines(rows, [scores]) == lines(rows, [scores], is_packed=True) == [expected]


def test_parquet_keeps_its_types_and_gets_columns_that_all_its_shards_share(parquet):
    tables, shards = [], cut_into_shards(identify([str(parquet)]), 4)
    for rows, scores in zip(read_shards(shards, 4), ([(0.1,)] * 4, [BAD] * 4), strict=True):
        content = render_shard(rows, by_output(scores), ["reward"], is_packed=False)
        tables.append(pq.read_table(io.BytesIO(content)))
    before = pq.read_table(parquet)
    both = pa.concat_tables(tables)  # raises where schemas differ
    assert both.select(before.column_names).equals(before)
    assert both.column("reward").to_pylist() == [pytest.approx(0.1)] * 4 + [None] * 4
    assert both.column("error").to_pylist() == [None] * 4 + [ERROR["error"]] * 4
    assert both.schema.field("reward").type == pa.float32()


def test_parquet_with_lists_and_pairs_gets_both_kinds_of_columns():
    columns = {
        "prompt": ["a", "a"],
        "responses": [["x", "y"], None],
        "chosen": [None, "x"],
        "rejected": [None, "y"],
        "rewards": [[9.0], [9.0]],
    }
    table = pa.table(columns)
    rows = ShardRows(range(2), table.to_pylist(), table)
    content = render_shard(rows, by_output([(1.0, 2.0), (3.0, 4.0)]), ["reward"], is_packed=False)
    result = pq.read_table(io.BytesIO(content))
    assert result.column("rewards").to_pylist() == [[1.0, 2.0], None]
    assert result.column("chosen_reward").to_pylist() == [None, 3.0]


@pytest.mark.parametrize("kind", ["json", "table"])
def test_every_output_has_columns_of_its_own(kind):
    """Single, list and pair; the parts of tokens are lists, and null where a row has no score."""
    rows = [{"prompt": "a", "response": "x"}, {"prompt": "a", "response": ""}]
    outputs = ["reward", "implicit", "tokens"]
    scores = [{"reward": [0.25], "implicit": [0.5], "tokens": [[0.5, 0.0]]}, BAD]
    content = render_shard(
        ShardRows(range(2), rows, pa.Table.from_pylist(rows) if kind == "table" else None),
        scores,
        outputs,
        is_packed=False,
    )
    if kind == "table":
        written = pq.read_table(io.BytesIO(content)).to_pylist()
    else:
        written = [json.loads(line) for line in content.splitlines()]
    added = {"reward": 0.25, "implicit_reward": 0.5, "token_rewards": [0.5, 0.0]}
    assert written[0].items() >= added.items()
    assert written[1].items() >= (dict.fromkeys(added) | ERROR).items()
    pair = ShardRows([0], [{"chosen": "x", "rejected": "y"}])
    both = {"reward": [1.0, 2.0], "implicit": [3.0, 4.0], "tokens": [[1.0], [2.0]]}
    (row,) = map(json.loads, render_shard(pair, [both], outputs, is_packed=False).splitlines())
    assert (row["chosen_reward"], row["rejected_implicit_reward"]) == (1.0, 4.0)
    assert row["rejected_token_rewards"] == [2.0]


def test_a_selection_of_parquet_writes_what_json_has_no_word_for_as_text(parquet):
    (rows,) = read_shards(cut_into_shards(identify([f"{parquet}#limit=1"]), 4), 4)
    (row,) = lines(rows, [(1.0,)])
    assert datetime.fromisoformat(row["when"]).year == 1970
    assert row["reward"] == 1.0
