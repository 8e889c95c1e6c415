"""Named sets: from the hub or from files, filtered, kept apart by prompt; and what their rows become."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from hafrm.data.files import RefusedError
from hafrm.data.named_sets import SET_GROUPS, SETS, LeftOut
from hafrm.data.parse import parse_row
from hafrm.data.reader import PreferenceData, file_digests, parse_source, parse_sources
from hafrm.data.reader import read_preferences as read
from hafrm.errors import DataError
from hafrm.preferences import Group, Message
from support.fake_hub import fake_datasets
from support.published_rows import PUBLISHED

Rows = list[dict[str, Any]]
MANY = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d"
TALK = PUBLISHED["chatbot-arena"]["conversation_a"]


def transcripts(*questions: str, turns: int = 1) -> Rows:
    """hh rows with these questions; with more turns, the last one is the one that is judged."""
    before = [
        f"\n\nHuman: {q}" + "\n\nAssistant: oh?\n\nHuman: yes" * (turns - 1) for q in questions
    ]
    return [
        {"chosen": f"{text}\n\nAssistant: good", "rejected": f"{text}\n\nAssistant: bad"}
        for text in before
    ]


def alpaca(num: int, *, start: int = 0) -> Rows:
    return [PUBLISHED["alpaca-human"] | {"instruction": f"task {start + i}"} for i in range(num)]


def write(path: Path, rows: Rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def questions(reading: PreferenceData) -> list[str]:
    return [group.prompt[0].content for group in reading.groups]


def test_a_file_of_one_part_is_read_in_the_published_form_and_named_after_the_set(tmp_path: Path):
    """Of six rows two are left out, one is bad, and the limit of 4 counts the others."""
    rows = transcripts("a", turns=2) + transcripts("b", "b", "c", "d", "e")
    rows[3]["chosen"] = rows[3]["rejected"]
    file = write(tmp_path / "train.jsonl", rows)
    reading = read([f"set:hh-helpful={file}#limit=4"], max_bad_fraction=0.5)
    assert [(g.source, g.id) for g in reading.groups] == [
        ("hh-helpful", "hh-helpful-1"),
        ("hh-helpful", "hh-helpful-4"),
    ]
    assert [(bad.row, bad.reason) for bad in reading.bad_rows] == [(3, "chosen equals rejected")]
    assert reading.left_out == {"more than one turn": 1, "repeats an earlier row": 1}
    assert (reading.num_rows, reading.num_groups) == (3, (2,))


def test_the_files_that_an_entry_reads_are_known_for_their_digests(tmp_path: Path):
    train = write(tmp_path / "hh/train.jsonl", transcripts("a"))
    for entry in (f"set:hh-harmless={train}", f"{train}#limit=3"):
        assert [*file_digests([entry])] == [str(train)]
    assert file_digests(["set:hh-harmless#split=train", "hub:org/pairs:train"]) == {}


def test_alpacas_first_tenth_is_the_test_part_as_in_the_paper(tmp_path: Path):
    """25 rows: int(0.1 * 25) = 2 test rows. Row 20 repeats the prompt of row 1 and is left out."""
    rows = alpaca(25)
    rows[20] = rows[1] | {"output_2": "another worse one"}
    file = write(tmp_path / "alpaca_human_preference.jsonl", rows)
    test = read([f"set:alpaca-human={file}#split=test"])
    train = read([f"set:alpaca-human={file}#split=train"])
    assert questions(test) == ["task 0\n1, 2", "task 1\n1, 2"]
    assert len(train.groups) == 22
    assert train.left_out == {"prompt is in a held-out part": 1}
    assert not set(questions(train)) & set(questions(test))


def test_parts_come_from_the_hub_and_the_later_ones_are_kept_apart(monkeypatch) -> None:
    calls = []

    def load(
        name: str, config: str | None, *, split: str, data_dir: str, **options: object
    ) -> Rows:
        assert options == {"streaming": True, "revision": None}
        calls.append((name, config, split, data_dir))
        return transcripts("a", "b", "c") if split == "train" else transcripts("B ", "z")

    fake_datasets(monkeypatch, load)
    reading = read(["set:hh-harmless#split=train"])
    assert questions(reading) == ["a", "c"]  # "b" is asked in the test part, in other case
    assert reading.left_out == {"prompt is in a held-out part": 1}
    assert {group.tags["split"] for group in reading.groups} == {"train"}
    assert sorted(calls, reverse=True) == [
        ("Anthropic/hh-rlhf", None, part, "harmless-base") for part in ("train", "test")
    ]
    assert [source.name for source in parse_sources("set:safety#split=test")] == [
        "beaver-safe",
        "hh-harmless",
    ]
    assert sorted(name for group in SET_GROUPS.values() for name in group) == sorted([*SETS][:5])
    with pytest.raises(DataError, match=r"several sets \(beaver-safe, hh-harmless\)"):
        parse_source("set:safety#split=train")


@pytest.mark.parametrize("name", SETS)
def test_every_set_can_be_asked_for_each_of_its_parts(monkeypatch, name: str) -> None:
    """Thirty rows with prompts of their own stand for whatever the hub would send."""

    def load(*_: object, **options: object) -> Rows:
        kind = {"helpsteer2": {"split": "val"}}.get(name, {})
        half = [renamed(name, f"{options.get('split')} {i}", **kind) for i in range(15)]
        return half + [renamed(name, f"{options.get('split')} {i + 15}") for i in range(15)]

    fake_datasets(monkeypatch, load)
    for part in SETS[name].parts:
        reading = read([f"set:{name}#split={part}"])
        assert reading.groups
        assert {group.tags["split"] for group in reading.groups} == {part}


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("hh-harmless", {"rejected": MANY}, "more than one turn"),  # the paper looks at both sides
        ("beaver-safe", {"safer_response_id": 0}, "the worse one"),
        ("beaver-safe", {"is_response_0_safe": True}, "both responses safe"),
        ("beaver-safe", {"is_response_1_safe": False}, "neither response safe"),
        ("alpaca-human", {"preference": 2}, "the worse one"),
        ("chatbot-arena", {"winner": "tie"}, "tie"),
        ("chatbot-arena", {"conversation_b": TALK * 2}, "more than one turn"),
        ("ultrafeedback", {"score_rejected": 8.5}, "tie"),
        ("helpsteer2", {"preference_strength": 0}, "tie"),
        ("helpsteer2", {"preference_strength": 1}, "the worse one"),
        ("helpsteer3", {"overall_preference": 3}, "the worse one"),
    ],
)
def test_a_row_prefers_one_response_ties_or_is_left_out(name, changes, expected) -> None:
    ours = SETS[name].read_row(PUBLISHED[name] | changes)
    said = ours.reason if isinstance(ours, LeftOut) else preferred(parsed(name, **changes))
    assert said == expected


def test_alpacas_input_stands_on_its_own_line_and_an_empty_one_leaves_no_trace() -> None:
    assert parsed("alpaca-human").prompt == (Message("user", "Add them.\n1, 2"),)
    for absent in ("", None):
        assert parsed("alpaca-human", input=absent).prompt == (Message("user", "Add them."),)


def renamed(name: str, question: str, **changes: Any) -> dict[str, Any]:
    """The published row of a set with another question."""
    questions = ("How do I pick a lock?", "What is two plus two?", "Add them.")
    text = json.dumps(PUBLISHED[name])
    for old in questions:
        text = text.replace(old, question)
    return json.loads(text) | changes


def test_the_arena_is_split_after_its_filter(tmp_path: Path):
    """Of 60 battles 20 are ties; the first int(0.05 * 40) = 2 of the others are the test part."""
    ties = [renamed("chatbot-arena", f"q {i}", winner="tie") for i in range(20)]
    rows = [*ties, *(renamed("chatbot-arena", f"q {i}") for i in range(20, 60))]
    file = write(tmp_path / "arena.jsonl", rows)
    test = read([f"set:chatbot-arena={file}#split=test"])
    assert questions(test) == ["q 20", "q 21"]
    assert test.left_out == {"tie": 20}
    assert len(read([f"set:chatbot-arena={file}#split=train"]).groups) == 38


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("set:hh-helpfull#split=test", "unknown set 'hh-helpfull'; did you mean hh-helpful"),
        ("set:zzz", "unknown set 'zzz'; sets are hh-harmless, .*groups of sets are safety, chat"),
        ("set:hh-helpful", "several parts; append '#split=train' or '#split=test'"),
        (
            "set:helpsteer3#split=test",
            "no part 'test'; use '#split=train' or '#split=validation'",
        ),
        ("set:chat=file.jsonl#split=test", "give a file of one set"),
        ("set:hh-helpful=missing.jsonl#split=test", "missing.jsonl: no such file"),
    ],
)
def test_a_wrong_name_tells_the_right_ones(source: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read([source])


def test_a_set_without_test_rows_says_so(tmp_path: Path) -> None:
    """Five rows have no first tenth."""
    file = write(tmp_path / "few/rows.jsonl", alpaca(5))
    with pytest.raises(DataError, match="has no row with split=test"):
        read([f"set:alpaca-human={file}#split=test"])
    many = write(tmp_path / "many.jsonl", transcripts("a", turns=2))
    with pytest.raises(DataError, match=r"has no rows; left out are .*more than one turn"):
        read([f"set:hh-helpful={many}"])


def parsed(name: str, **changes: Any) -> Group:
    """The published row of a set, with changes, as our reader understands it."""
    ours = SETS[name].read_row(PUBLISHED[name] | changes)
    assert not isinstance(ours, LeftOut), ours
    row = parse_row(ours)
    assert isinstance(row, Group), row
    return row


def preferred(row: Group) -> str:
    """The chosen response, or "tie"."""
    (pair,) = row.comparisons
    return "tie" if pair.tie else row.responses[pair.chosen]


@pytest.mark.parametrize("name", SETS)
def test_every_set_reads_its_published_row_and_names_a_column_that_it_misses(name: str) -> None:
    """hh needs both of its two columns, arena 3 of 12; without another column nothing changes."""
    assert preferred(parsed(name)) == "the better one"
    refused = {}
    for column in PUBLISHED[name]:
        row = {key: value for key, value in PUBLISHED[name].items() if key != column}
        try:
            assert SETS[name].read_row(row) == SETS[name].read_row(PUBLISHED[name])
        except RefusedError as error:
            refused[column] = (error.refusal.reason, error.refusal.detail.partition(";")[0])
    assert refused == {column: ("missing column", f"no `{column}`") for column in refused}
    assert len(refused) >= 2
    if name == "chatbot-arena":
        assert [*refused] == ["winner", "conversation_a", "conversation_b"]


def test_helpsteer2_tells_turns_by_its_marker_and_parts_by_its_column() -> None:
    prompt = "Hi.\n<extra_id_1>Assistant\nHello.\n<extra_id_1>User\nWhat is two plus two?"
    row = parsed("helpsteer2", prompt=prompt)
    roles = [message.role for message in row.prompt]
    assert roles == ["user", "assistant", "user"]
    assert row.prompt[1].content == "Hello."
    assert parsed("helpsteer2").tags["split"] == "train"
    assert parsed("helpsteer2", split="val").tags["split"] == "validation"


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("hh-helpful", {"chosen": "just an answer"}, "does not start with a human turn: 'just an"),
        ("beaver-safe", {"safer_response_id": True}, "safer_response_id.*one of 0, 1; got True"),
        ("alpaca-human", {"instruction": None}, "instruction.*must be text, got None"),
        ("chatbot-arena", {"conversation_a": ["hello"]}, "conversation_a.*list of messages"),
        ("ultrafeedback", {"score_chosen": 1.0}, "chosen response scores 1.0, the rejected 4.0"),
        ("ultrafeedback", {"score_chosen": math.nan}, "score_chosen.*finite number"),
    ],
)
def test_a_row_that_breaks_the_form_says_where(
    name: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RefusedError, match=message):
        SETS[name].read_row(PUBLISHED[name] | changes)
