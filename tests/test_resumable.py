"""Output folders that resume: what a kill leaves, and what is refused."""

import json

import pytest

from hafrm.errors import CheckpointError
from hafrm.resumable import RecordFile, ResumableFolder


def test_records_come_back_and_a_line_that_a_kill_cut_short_is_removed(tmp_path):
    file = tmp_path / "x.jsonl"
    RecordFile(file).add([{"id": "a", "n": 1}, {"id": "b", "n": 2}])
    with file.open("ab") as open_file:
        open_file.write(b'{"id": "c", "n"')
    journal = RecordFile(file)
    assert list(journal.records) == ["a", "b"]
    journal.add([{"id": "c", "n": 3}])
    assert [json.loads(line)["id"] for line in file.read_text().splitlines()] == ["a", "b", "c"]


def test_a_file_made_with_other_settings_is_refused_and_what_differs_is_named(tmp_path):
    out = tmp_path / "out"
    with ResumableFolder.open(out, "best-of-n") as folder:
        folder.records("a.jsonl", {"seed": 0, "num": 4}).add([{"id": "x"}])
        folder.records("empty.jsonl", {"seed": 0})
    with ResumableFolder.open(out, "best-of-n") as folder:
        assert list(folder.records("a.jsonl", {"num": 4, "seed": 0}).records) == ["x"]
        with pytest.raises(CheckpointError, match=r"different: seed\).*another --out"):
            folder.records("a.jsonl", {"seed": 1, "num": 4})
        folder.records("empty.jsonl", {"seed": 1})  # nothing depends on it yet


def test_folders_of_something_else_files_and_folders_in_use_are_refused(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("x")
    (tmp_path / "file").write_text("x")

    def refused(name: str, kind: str, message: str) -> None:
        folder = ResumableFolder.open(tmp_path / name, kind)
        with pytest.raises(CheckpointError, match=message), folder:
            pass

    for name in ("run", "file"):
        refused(name, "b", "not empty")
    with ResumableFolder.open(tmp_path / "out", "b"):
        refused("out", "b", "in use")
    refused("out", "other", "no job of this kind")
