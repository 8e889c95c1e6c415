"""Files that grow: what a kill leaves, what is refused, and what goes on."""

import json

import pytest

from hafrm.alignment.journal import JobFolder, Journal
from hafrm.errors import CheckpointError


def test_records_come_back_and_a_line_that_a_kill_cut_short_is_taken_away(tmp_path):
    file = tmp_path / "x.jsonl"
    Journal(file).add([{"id": "a", "n": 1}, {"id": "b", "n": 2}])
    with file.open("ab") as open_file:
        open_file.write(b'{"id": "c", "n"')
    journal = Journal(file)
    assert list(journal.records) == ["a", "b"]
    journal.add([{"id": "c", "n": 3}])
    assert [json.loads(line)["id"] for line in file.read_text().splitlines()] == ["a", "b", "c"]


def test_a_file_made_otherwise_is_refused_and_told_what_differs(tmp_path):
    out = tmp_path / "out"
    with JobFolder.open(out, "best-of-n") as folder:
        folder.journal("a.jsonl", {"seed": 0, "num": 4}).add([{"id": "x"}])
        folder.journal("empty.jsonl", {"seed": 0})
    with JobFolder.open(out, "best-of-n") as folder:
        assert list(folder.journal("a.jsonl", {"num": 4, "seed": 0}).records) == ["x"]
        with pytest.raises(CheckpointError, match=r"different: seed\).*another --out"):
            folder.journal("a.jsonl", {"seed": 1, "num": 4})
        folder.journal("empty.jsonl", {"seed": 1})  # nothing depends on it yet


def test_folders_of_something_else_files_and_folders_in_use_are_refused(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("x")
    (tmp_path / "file").write_text("x")
    for name, message in (("run", "not empty"), ("file", "is a file")):
        with pytest.raises(CheckpointError, match=message), JobFolder.open(tmp_path / name, "b"):
            pass
    with (
        JobFolder.open(tmp_path / "out", "b"),
        pytest.raises(CheckpointError, match="in use"),
        JobFolder.open(tmp_path / "out", "b"),
    ):
        pass
    with (
        pytest.raises(CheckpointError, match="no job of this kind"),
        JobFolder.open(tmp_path / "out", "other"),
    ):
        pass
