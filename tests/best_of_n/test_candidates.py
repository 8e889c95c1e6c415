"""Prompts and candidates out of files of any shape."""

import json
import logging

import pytest

from hafrm.best_of_n.candidates import (
    Candidates,
    candidates_of,
    is_usable_text,
    read_candidates,
    read_prompts,
)
from hafrm.data.reader import read_preferences
from hafrm.errors import DataError
from hafrm.preferences import Group, Message


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_prompts_come_from_rows_of_any_shape_once_each(tmp_path):
    rows = [
        {"prompt": "a"},
        {"prompt": [{"role": "user", "content": "b"}], "id": "mine"},
        {"prompt": "c", "chosen": "x", "rejected": "y"},
        {"chosen": "\n\nHuman: d\n\nAssistant: x", "rejected": "\n\nHuman: d\n\nAssistant: y"},
        {"prompt": "a", "response": "z"},
        {"prompt": "e", "responses": []},
    ]
    found = read_prompts([write(tmp_path / "p.jsonl", rows)])
    assert [(g.id, g.prompt[-1].content) for g in found] == [
        ("p-0", "a"),
        ("mine", "b"),
        ("p-2", "c"),
        ("p-3", "d"),
        ("p-5", "e"),
    ]
    assert {g.source for g in found} == {"p"}
    assert all(g.responses == () for g in found)


def test_ids_are_told_apart_and_limits_kept(tmp_path):
    one = write(tmp_path / "one.jsonl", [{"prompt": "a", "id": "x"}, {"prompt": "b", "id": "x"}])
    found = read_prompts([one])
    assert len({group.id for group in found}) == 2
    assert len(read_prompts([f"{one}#limit=1"])) == 1


def test_empty_files_and_files_of_bad_rows_are_refused(tmp_path, caplog):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(DataError, match=r"empty.jsonl has no rows"):
        read_prompts([str(empty)])
    bad = write(tmp_path / "bad.jsonl", [{"prompt": "a"}, {"prompt": "  "}, {"text": "x"}])
    with pytest.raises(DataError, match=r"2 of 3 rows .* such as row 1: empty prompt"):
        read_prompts([bad])
    few = write(tmp_path / "few.jsonl", [{"prompt": str(i)} for i in range(60)] + [{"text": "x"}])
    with caplog.at_level(logging.WARNING, "hafrm"):
        assert len(read_prompts([few])) == 60
    assert "1 of 61 rows" in caplog.text


def test_candidates_are_the_first_distinct_responses_of_prompts_that_have_several(tmp_path, caplog):
    rows = [
        {"prompt": "a", "responses": ["x", "y", "x", "z"]},
        {"prompt": "b", "response": "alone"},
        {"prompt": "c", "chosen": "good", "rejected": "bad"},
    ]
    with caplog.at_level(logging.WARNING, "hafrm"):
        found = read_candidates([write(tmp_path / "c.jsonl", rows)], 2)
    assert [each.group.responses for each in found] == [("x", "y"), ("good", "bad")]
    assert all(each.group.comparisons == () for each in found)
    assert "1 of 3 prompts have fewer than two responses" in caplog.text
    with pytest.raises(DataError, match=r"none of 1 prompts has two responses.*--policy"):
        read_candidates([write(tmp_path / "d.jsonl", rows[1:2])], 4)


def test_a_record_gives_back_what_was_drawn_and_is_a_row_of_data(tmp_path):
    prompt = Group("p-0", (Message("user", "a"),), (), source="p")
    found = candidates_of(prompt, ["x", "y", "x"])
    assert (found.group.responses, found.drawn) == (("x", "y"), (0, 1, 0))
    record = json.loads(json.dumps(found.to_record()))
    assert Candidates.from_record(record) == found
    (group,) = read_preferences(
        [write(tmp_path / "c.jsonl", [record])], need_comparisons=False
    ).groups
    assert (group.id, group.prompt, group.responses) == ("p-0", prompt.prompt, ("x", "y"))


@pytest.mark.parametrize("text", ["", " \n", "a\0b", "\ud800"])
def test_what_is_no_text_is_no_candidate(text):
    assert not is_usable_text(text)
