"""Inputs are counted and known by content, and their shards cover every row once."""

import gzip
import json

import pytest

from hafrm.bulk.shards import Shard, cut_into_shards, file_suffix, identify
from hafrm.errors import ConfigError, DataError


def write(file, num=5):
    file.parent.mkdir(exist_ok=True)
    text = "".join(json.dumps({"prompt": "a", "response": str(i)}) + "\n" for i in range(num))
    data = gzip.compress(text.encode()) if file.suffix == ".gz" else text.encode()
    file.write_bytes(data)
    return str(file)


def parquet(file, num=5):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"prompt": ["a"] * num, "response": ["b"] * num}), file)
    return str(file)


def test_a_folder_is_its_files_by_name_and_what_is_no_data_is_named(tmp_path, caplog):
    for name in ("b.jsonl", "a.jsonl.gz", "_SUCCESS", ".hidden.jsonl", "notes.md"):
        write(tmp_path / name)
    inputs = identify([str(tmp_path)])
    assert [item.stem for item in inputs] == ["a", "b"]
    assert [item.num_rows for item in inputs] == [5, 5]
    assert "notes.md is not scored" in caplog.text
    assert "SUCCESS" not in caplog.text


def test_inputs_of_one_name_get_outputs_of_two(tmp_path):
    given = [write(tmp_path / place / "x.jsonl") for place in ("one", "two")]
    shards = cut_into_shards(identify(given), 100)
    assert [shard.file for shard in shards] == ["x.jsonl", "x~2.jsonl"]


def test_shards_cover_all_rows_once_and_say_how_many_they_are(tmp_path):
    source = write(tmp_path / "x.jsonl", 5)
    assert cut_into_shards(identify([source]), 2) == (
        Shard("x-00000-of-00003.jsonl", source, 0, 2),
        Shard("x-00001-of-00003.jsonl", source, 2, 4),
        Shard("x-00002-of-00003.jsonl", source, 4, 5),
    )


def test_outputs_are_of_their_inputs_kind_unless_a_selection_breaks_the_table(tmp_path):
    given = [
        write(tmp_path / "a.jsonl"),
        write(tmp_path / "b.jsonl.gz"),
        parquet(tmp_path / "c.parquet"),
        f"{parquet(tmp_path / 'd.parquet')}#limit=3",
    ]
    shards = cut_into_shards(identify(given), 100)
    assert [shard.file for shard in shards] == ["a.jsonl", "b.jsonl.gz", "c.parquet", "d.jsonl"]
    assert [shard.stop for shard in shards] == [5, 5, 5, 3]


def test_an_input_without_rows_still_gets_an_output(tmp_path):
    (tmp_path / "x.jsonl").write_text("")
    (shard,) = cut_into_shards(identify([str(tmp_path / "x.jsonl")]), 10)
    assert (shard.start, shard.stop) == (0, 0)


def test_what_decides_follows_the_content_and_not_the_place(tmp_path):
    (one,) = identify([write(tmp_path / "a" / "x.jsonl")])
    (moved,) = identify([write(tmp_path / "b" / "x.jsonl")])
    (other,) = identify([write(tmp_path / "c" / "x.jsonl", 6)])
    (part,) = identify([write(tmp_path / "a" / "x.jsonl") + "#limit=2"])
    assert one.cache_key == moved.cache_key
    assert one.cache_key != other.cache_key
    assert one.cache_key != part.cache_key


def test_damaged_missing_and_repeated_inputs_are_refused_by_name(tmp_path):
    good = write(tmp_path / "x.jsonl.gz", 500)
    with pytest.raises(DataError, match=r"x\.jsonl\.gz is given twice"):
        identify([good, good])
    with pytest.raises(DataError, match="no such file"):
        identify([str(tmp_path / "nowhere.jsonl")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no file"):
        identify([str(tmp_path / "empty")])
    torn = tmp_path / "torn.jsonl.gz"
    torn.write_bytes((tmp_path / "x.jsonl.gz").read_bytes()[:-40])
    with pytest.raises(DataError, match=r"torn\.jsonl\.gz cannot be read"):
        identify([good, str(torn)])
    half = tmp_path / "half.parquet"
    parquet(half, 100)
    half.write_bytes(half.read_bytes()[:-60])
    with pytest.raises(DataError, match=r"half\.parquet"):
        identify([str(half)])


def test_names_that_would_collide_and_impossible_outputs_are_refused(tmp_path):
    given = [write(tmp_path / "x.jsonl", 3), write(tmp_path / "x-00000-of-00002.jsonl", 1)]
    with pytest.raises(DataError, match="two outputs would be called x-00000-of-00002"):
        cut_into_shards(identify(given), 2)
    with pytest.raises(DataError, match="cannot become Parquet"):
        cut_into_shards(identify(given[:1]), 2, ".parquet")
    with pytest.raises(ConfigError, match="1 or more, got 0"):
        cut_into_shards(identify(given), 0)
    with pytest.raises(DataError, match=r"must end in one of \.jsonl"):
        file_suffix("out.csv")
