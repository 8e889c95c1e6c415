"""PreferenceData: every kind of file, merging into groups, the account of bad rows."""

import csv
import gzip
import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from hafrm.data.reader import read_preferences as read
from hafrm.errors import DataError
from hafrm.preferences import Comparison, Group, Message, Votes
from support.fake_hub import fake_datasets


def pair(prompt: str = "p", chosen: str = "a", rejected: str = "b", **extra: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **extra}


def jsonl(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


ROWS = [
    pair("one\ntwo", 'quoted "a", \N{SNOWMAN}', "b\r\nc", margin=1.5, split="train"),
    pair("second", "x", "y", margin=-2.0, split="test"),
]


def as_csv(path: Path, rows: Sequence[dict[str, Any]] = ROWS) -> None:
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def as_parquet(path: Path, rows: Sequence[dict[str, Any]] = ROWS) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(list(rows)), path)


LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
WRITERS: dict[str, Callable[[Path], object]] = {
    "set.json": lambda path: path.write_text(json.dumps(ROWS)),
    "set.json.gz": lambda path: path.write_bytes(gzip.compress(json.dumps(ROWS).encode())),
    "set.jsonl": lambda path: path.write_bytes(LINES),
    "set.ndjson": lambda path: path.write_bytes(LINES),
    "SET.JSONL.GZ": lambda path: path.write_bytes(gzip.compress(LINES)),
    "set.v2.jsonl": lambda path: path.write_bytes(LINES),
    "set.csv": as_csv,
    "set.parquet": as_parquet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_reads_the_same(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    reading = read([str(tmp_path / name)])
    stem = {"SET.JSONL.GZ": "SET", "set.v2.jsonl": "set.v2"}
    source = stem.get(name, "set")
    assert reading.groups == tuple(
        Group(
            f"{source}-{number}",
            (Message("user", row["prompt"]),),
            (row["chosen"], row["rejected"]),
            (Comparison(0, 1, margin=row["margin"]),),
            source,
            {"split": row["split"]},
        )
        for number, row in enumerate(ROWS)
    )
    assert (reading.num_rows, reading.bad_rows) == (2, ())


def test_messages_come_back_from_parquet_and_from_csv(tmp_path: Path) -> None:
    prompt = [{"role": "user", "content": "[why]?"}]
    nested = {"prompt": prompt, "responses": ["a", "b", "c"], "ranks": [2, 1, 3]}
    as_parquet(tmp_path / "ranked.parquet", [nested | {"votes": None}])
    as_csv(tmp_path / "ranked.csv", [{key: json.dumps(value) for key, value in nested.items()}])
    from_parquet, from_csv = (read([tmp_path / "ranked.parquet"]), read([tmp_path / "ranked.csv"]))
    assert from_parquet.groups == from_csv.groups
    assert from_csv.groups[0].prompt == (Message("user", "[why]?"),)
    assert len(from_csv.groups[0].comparisons) == 3


def test_csv_cells_are_read_by_their_column_and_bad_rows_counted(tmp_path: Path) -> None:
    path = tmp_path / "cells.csv"
    lines = [
        "\ufeffprompt,chosen,rejected,margin,weight,votes,tie",
        '[1] is text,"{""a"": 1}",12,0.5,2,"[3, 1]",',
        "",
        "q,a,b,,,,TRUE",
        "p,a,b,NaN,,,",
        "p,a,b,1",
        "p,,b,1,,,",
        "p,a,b,1,,three,",
        "\"[{'role': 'user', 'content': 'a repr'}]\",a,b,1,,,",
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    reading = read([path], max_bad_fraction=1.0)
    first, second = reading.groups
    assert first.prompt[0].content == "[1] is text" and first.responses == ('{"a": 1}', "12")
    assert first.comparisons == (Comparison(0, 1, 0.5, 2.0, votes=Votes(3, 1, 0)),)
    assert second.comparisons == (Comparison(0, 1, tie=True),)
    assert [(bad.row, bad.reason) for bad in reading.bad_rows] == [
        (2, "non-finite margin"), (3, "unreadable row"), (4, "empty response"),
        (5, "unreadable row"), (6, "unreadable row"),
    ]  # fmt: skip


def test_unreadable_lines_are_bad_rows_under_their_line_number(tmp_path: Path) -> None:
    deep = "[" * 100_000
    lines = ["\ufeff" + json.dumps(pair()), "", "{broken", "[1, 2]", "NaN", deep, "  ", '"text"']
    path = tmp_path / "lines.jsonl"
    path.write_text("\r\n".join([*lines, json.dumps(pair("q\u2028r"))]), encoding="utf-8")
    side_file = tmp_path / "new" / "bad.jsonl"
    reading = read([path], max_bad_fraction=0.9, bad_rows_file=side_file)
    assert [bad.row for bad in reading.bad_rows] == [2, 3, 4, 5, 7]
    assert {bad.reason for bad in reading.bad_rows} == {"unreadable row"}
    assert [group.id for group in reading.groups] == ["lines-0", "lines-8"]
    assert reading.num_rows == 7
    listed = [json.loads(line) for line in side_file.read_text().splitlines()]
    assert [row["row"] for row in listed] == [2, 3, 4, 5, 7]
    assert listed[0].keys() == {"source", "row", "reason", "detail"}
    assert listed[0]["source"] == str(path)


def test_the_side_file_is_written_before_the_error_and_emptied_when_all_is_well(
    tmp_path: Path,
) -> None:
    side_file = tmp_path / "bad.jsonl"
    rows = [pair(), pair(chosen=""), pair("\ud800"), pair("q", "", "b")]
    with pytest.raises(DataError) as caught:
        read([jsonl(tmp_path / "set.jsonl", rows)], bad_rows_file=side_file)
    message = str(caught.value)
    for expected in (
        "3 of 4 rows", "75.0%", "allowed: 2.0%", "2  empty response", "row 1", "1  unusable character",
        str(side_file), "data.max_bad_fraction",
    ):  # fmt: skip
        assert expected in message
    assert message.isascii() and len(side_file.read_text().splitlines()) == 3
    read([[pair()]], bad_rows_file=side_file)
    assert side_file.read_text() == ""


def test_a_small_bad_file_does_not_hide_behind_a_large_good_one(tmp_path: Path) -> None:
    good = jsonl(tmp_path / "good.jsonl", [pair(f"p{index}") for index in range(60)])
    poor = jsonl(tmp_path / "poor.jsonl", [pair(), pair("q", "a", "")])
    with pytest.raises(DataError, match=r"1 of 2 rows of .*poor"):
        read([good, poor])
    assert len(read([good, poor], max_bad_fraction=0.5).groups) == 61


def test_rows_of_one_prompt_become_one_group_with_distinct_responses() -> None:
    rows = [
        pair("p", "a", "b", id="first", label="human", subset="s"),
        pair("q", "a", "b", tools=[]),
        pair("p", "c", "a", label="human", subset="other"),
        pair("p", "c", "a", label="ai:gpt", subset="s"),
        {"prompt": "p", "responses": ["c", "b", "d"], "ranks": [1, 2, 2], "subset": "s"},
    ]
    reading = read([rows])
    group = reading.groups[0]
    assert (group.id, group.responses) == ("first", ("a", "b", "c", "d"))
    assert [(c.chosen, c.rejected, c.tie) for c in group.comparisons] == [
        (0, 1, False), (2, 0, False), (2, 1, False), (2, 3, False), (1, 3, True)
    ]  # fmt: skip
    assert group.tags == {"subset": "s"}, "rows disagree about the label"
    assert reading.groups[1].id == "memory-1"
    assert reading.unread_columns == ("tools",)


def test_disagreement_is_kept_and_repetition_is_a_bad_row() -> None:
    rows = [
        pair("p", "a", "b"),
        pair("p", "b", "a"),
        pair("p", "a", "b", margin=3.0),
        pair("p", "a", "b", tie=True),
        pair("p", "b", "a", tie=True),
    ]
    reading = read([rows], max_bad_fraction=0.5)
    assert [(b.row, b.reason) for b in reading.bad_rows] == [(2, "duplicate"), (4, "duplicate")]
    compared = (Comparison(0, 1), Comparison(1, 0), Comparison(0, 1, tie=True))
    assert reading.groups[0].comparisons == compared


def test_a_selection_picks_rows_by_tag_and_number(tmp_path: Path) -> None:
    rows = [pair(f"p{index}", split="train" if index % 2 else "test") for index in range(10)]
    path = jsonl(tmp_path / "set#1.jsonl", rows)  # "#" may be part of a name
    picked = [group.id for group in read([f"{path}#split=train"]).groups]
    assert picked == [f"set#1-{i}" for i in (1, 3, 5, 7, 9)]
    picked = [group.id for group in read([f"{path}#split=test&limit=2"]).groups]
    assert picked == ["set#1-0", "set#1-2"]
    assert read([path]).num_rows == 10
    assert read([f"{path}#limit=3"]).num_rows == 3
    both = read([f"{path}#split=test", f"{path}#split=train"])
    assert {group.source for group in both.groups} == {"set#1"} and both.num_rows == 10
    with pytest.raises(DataError, match="has no row with split=dev"):
        read([f"{path}#split=dev"])
    for wrong in ("split", "split=", "colour=red", "limit=0", "limit=x", "split=train&"):
        with pytest.raises(DataError, match="limit"):
            read([f"{path}#{wrong}"])


def test_two_files_of_one_stem_are_told_apart_and_one_file_is_not_read_twice(
    tmp_path: Path,
) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        jsonl(tmp_path / folder / "set.jsonl", [pair()])
    reading = read([tmp_path / "a/set.jsonl", tmp_path / "b/set.jsonl", [pair()], [pair()]])
    assert [group.source for group in reading.groups] == ["set", "set~2", "memory", "memory~2"]
    assert [group.id for group in reading.groups] == ["set-0", "set~2-0", "memory-0", "memory~2-0"]
    with pytest.raises(DataError, match="given twice"):
        read([tmp_path / "a/set.jsonl", str(tmp_path / "a/set.jsonl")])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, "no such file"),
        ("set.txt", b"x", r"allowed are .json, .jsonl, .ndjson, .csv, .parquet"),
        ("set", b"x", "unknown kind"),
        ("set.parquet.gz", b"x", "unknown kind"),
        ("set.jsonl", b"", "has no rows"),
        ("set.json", b"[]", "has no rows"),
        ("set.csv", b"prompt,chosen,rejected\n", "has no rows"),
        ("set.csv", b'prompt\nfirst\n"second\nthird\n', "cannot be read after row 0"),
        ("set.csv", b"prompt,prompt\n", "distinct column names"),
        ("set.json", b'{"rows": []}', "must hold a list of rows"),
        (
            "set.jsonl",
            b'{"question": 1, "answer": 2}',
            r"no usable columns: .*\['question', 'answer'\]",
        ),
        ("set.jsonl", b'{"prompt": "a", "chosen": "b"}', r"data.columns: \{rejected: \.\.\.\}"),
        ("set.jsonl", b'{"prompt": "a", "response": "b"}', "for a model to respond to$"),
        ("set.json", b'{"a": 1}\n{"a": 2}\n', "name it .jsonl"),
        ("set.json", b"[" * 100_000, "is not JSON"),
        ("set.jsonl", '{"prompt": "\u00e9"}'.encode("latin-1"), "not UTF-8 text .*near row 0"),
        ("set.json", b'["\xff"]', "not UTF-8"),
        ("set.csv", b"prompt\n\xff\n", "not UTF-8"),
        ("set.jsonl.gz", gzip.compress(LINES)[:-20], "cannot be read"),
        ("set.parquet", b"PAR1 nothing PAR1", "Parquet"),
    ],
)
def test_a_file_that_cannot_be_used_is_a_clear_error(
    name: str, content: bytes | None, message: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read([str(tmp_path / name)])
    assert str(tmp_path / name) in str(caught.value) and len(str(caught.value)) < 1000


def test_directories_empty_lists_bare_strings_and_bad_rows_alone_are_clear_errors(
    tmp_path: Path,
) -> None:
    with pytest.raises(DataError, match="is a directory"):
        read([tmp_path])
    with pytest.raises(DataError, match="memory has no rows"):
        read([[]])
    with pytest.raises(DataError, match="no sources"):
        read([])
    with pytest.raises(DataError, match="list of sources"):
        read("set.jsonl")
    with pytest.raises(DataError, match="2 of 2 rows"):  # whatever is allowed
        read([[pair(chosen=""), pair(chosen="\0")]], max_bad_fraction=1.0)


@pytest.mark.parametrize(
    ("text", "call", "source"),
    [
        ("hub:org/pairs:train", ("org/pairs", None, "train", None), "pairs"),
        ("hub:pairs:en:test", ("pairs", "en", "test", None), "pairs-en"),
        ("hub:org/pairs@v1:train[:10%]", ("org/pairs", None, "train[:10%]", "v1"), "pairs"),
        ("hub:org/pairs:a-b:train[5:9]", ("org/pairs", "a-b", "train[5:9]", None), "pairs-a-b"),
    ],
)
def test_hub_names_are_taken_apart(
    text: str, call: tuple[object, ...], source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def load(
        name: str, config: str | None, *, split: str, revision: str | None, streaming: bool = False
    ) -> list[Any]:
        assert streaming == ("[" not in split)  # a slice is of the whole
        calls.append((name, config, split, revision))
        return [pair("p"), pair("q")]

    fake_datasets(monkeypatch, load)
    reading = read([f"{text}#limit=1"])
    assert calls == [call]
    assert (reading.groups[0].id, reading.groups[0].source) == (f"{source}-0", source)
    assert reading.num_rows == 1


def test_hub_errors_are_data_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: object, **options: object) -> object:
        raise ValueError("Unknown split 'dev'")

    fake_datasets(monkeypatch, load)
    with pytest.raises(DataError, match=r"hub:org/pairs:dev cannot be loaded: Unknown split 'dev'"):
        read(["hub:org/pairs:dev"])
    for wrong in ("hub:pairs", "hub::train", "hub:a:b:c:d"):
        with pytest.raises(DataError, match="not of the form"):
            read([wrong])


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_the_datasets_library_itself_streams_what_it_would_download(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """300 rows in two files of a local folder: the rows of the stream are those of the whole table, and of
    a set of which two rows are asked for, no more than the first block is read."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    load, opened = partial(datasets.load_dataset, cache_dir=str(tmp_path / "cache")), []

    def watched(*args: Any, **options: Any) -> Any:
        table = load(*args, **options)
        opened.append(type(table))
        return (opened.append(row["prompt"]) or row for row in table)

    monkeypatch.setattr(datasets, "load_dataset", watched)
    folder = tmp_path / "pairs"
    folder.mkdir()
    for part in range(2):
        turns = [{"role": "assistant", "content": "a"}]
        rows = [
            pair(f"p{i}", turns, "b", margin=i / 3) for i in range(150 * part, 150 * part + 150)
        ]
        file = folder / f"train-{part}.{kind}"
        if kind == "jsonl":
            jsonl(file, rows)
        else:
            datasets.Dataset.from_list(rows).to_parquet(file)
    streamed, sliced = read([f"hub:{folder}:train"]), read([f"hub:{folder}:train[:100%]"])
    kinds = [k for k in opened if isinstance(k, type)]
    assert kinds == [datasets.IterableDataset, datasets.Dataset]
    assert streamed == sliced and len(streamed.groups) == 300
    assert (streamed.groups[0].source, streamed.groups[0].responses) == ("pairs", ("a", "b"))
    opened.clear()
    assert read([f"hub:{folder}:train#limit=2"]).num_rows == 2 and len(opened) <= 1 + 3
    with pytest.raises(DataError, match="cannot be loaded"):
        read([f"hub:{folder}:dev"])


def test_a_dataset_in_memory_reads_as_the_list_of_its_rows() -> None:
    from datasets import Dataset

    rows = [pair("p", margin=1.0), pair("q", margin=None)]
    assert read([Dataset.from_list(rows)]) == read([rows])


def test_prompts_alone_are_read_where_no_responses_are_needed() -> None:
    """As are unlabelled responses where no comparisons are."""
    unlabelled = [{"prompt": "p", "response": "a"}, {"prompt": "p", "responses": ["b", "a"]}]
    (group,) = read([[*unlabelled, pair("p")]], need_comparisons=False).groups
    assert (group.responses, group.comparisons) == (("a", "b"), (Comparison(0, 1),))
    rows = [
        {"prompt": "q1"},
        {"prompt": "q2", "chosen": "a", "rejected": "b"},
        {"prompt": "q1"},
        {"prompt": [{"role": "user", "content": "q3"}]},
        {"question": "q4"},
    ]
    reading = read([rows], need_responses=False, max_bad_fraction=0.5)
    assert [group.prompt[-1].content for group in reading.groups] == ["q1", "q2", "q3"]
    assert [len(group.responses) for group in reading.groups] == [0, 2, 0]
    reasons = [(bad.row, bad.reason) for bad in reading.bad_rows]
    assert reasons == [(2, "duplicate"), (4, "missing column")]
    with pytest.raises(DataError, match="no responses that could be compared"):
        read([rows[:1]])


def test_columns_of_other_names_are_named_by_the_caller_or_behind_the_file(tmp_path: Path) -> None:
    rows = [{"question": "p", "good": "a", "bad": "b", "prompt": "not this", "tools": "x"}]
    path = jsonl(tmp_path / "set.jsonl", rows)
    names = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    expected = read([[pair()]]).groups[0].responses
    group = read([path], columns=names, ignore_columns=["tools"]).groups[0]
    assert group.prompt == (Message("user", "p"),) and group.responses == expected
    behind = f"{path}#prompt=question&chosen=good&rejected=bad&ignore=tools,images"
    assert read([behind]).groups[0] == group
    del rows[0]["prompt"]
    with pytest.raises(DataError, match="--columns prompt=question,chosen=good,rejected=bad"):
        read([jsonl(path, rows)])
    with pytest.raises(DataError, match="did you mean chosen"):
        read([path], columns={"choosen": "good"})


def test_context_that_is_not_read_is_an_error_that_names_it_and_its_remedy_works(
    tmp_path: Path,
) -> None:
    rows = [pair("p"), pair("q", tools=[{"name": "f"}], history=[["a", "b"]])]
    path = jsonl(tmp_path / "set.jsonl", rows)
    with pytest.raises(DataError, match=r"1 of 2 rows .*tools.*#ignore=tools"):
        read([path], max_bad_fraction=0.5)
    assert [bad.reason for bad in read([path], max_bad_fraction=1.0).bad_rows] == ["unread context"]
    assert len(read([f"{path}#ignore=tools,history"]).groups) == 2


@pytest.mark.parametrize("part", ["limit=" + "9" * 5000, "limit=" + "9" * 19, "x" * 300])
def test_absurd_selections_and_names_are_clear_errors(part: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read([f"{jsonl(tmp_path / 'set.jsonl', [pair()])}#{part}"])
    assert len(str(caught.value)) < 1000
    with pytest.raises(DataError, match="no such file"):
        read(["x" * 300 + ".jsonl"])


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match="pipe or a device"):
        read([tmp_path / "rows.jsonl"])


def test_dates_beyond_python_s_in_a_column_that_nobody_reads_do_no_harm(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {name: [value] for name, value in pair().items()}
    dates = pa.array([2**62], pa.timestamp("us"))
    pq.write_table(pa.table(columns | {"when": dates}), tmp_path / "set.parquet")
    assert read([tmp_path / "set.parquet"]).groups[0].responses == ("a", "b")
