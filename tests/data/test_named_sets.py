"""Named sets: from the hub or from files, filtered, kept apart by prompt; and what their rows become."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from hafrm.data.named_sets import SET_GROUPS, SETS
from hafrm.data.parse import ParsedRow, parse_row
from hafrm.data.reader import PreferenceData, local_files, parse_source
from hafrm.data.reader import read_preferences as read
from hafrm.data.values import LeftOut, RefusedError
from hafrm.errors import DataError
from hafrm.preferences import Message, Votes
from support.published_rows import PUBLISHED

Rows = list[dict[str, Any]]


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


def battles(num: int, **changes: Any) -> Rows:
    rows = []
    for i in range(num):
        talk = [
            [{"role": "user", "content": f"q {i}"}, {"role": "assistant", "content": a}]
            for a in "xy"
        ]
        row = PUBLISHED["chatbot-arena"] | {"conversation_a": talk[0], "conversation_b": talk[1]}
        rows.append(row | changes)
    return rows


def write(path: Path, rows: Rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def fake_hub(monkeypatch: pytest.MonkeyPatch, load: Callable[..., Any]) -> None:
    fake = ModuleType("datasets")
    monkeypatch.setattr(fake, "load_dataset", load, raising=False)
    monkeypatch.setitem(sys.modules, "datasets", fake)


def questions(reading: PreferenceData) -> list[str]:
    return [group.prompt[0].content for group in reading.groups]


def test_a_file_of_one_part_is_read_in_the_published_form_and_named_after_the_set(tmp_path: Path):
    rows = transcripts("a", "b") + transcripts("c", turns=2)
    file = write(tmp_path / "train.jsonl", rows)
    reading = read([f"set:hh-helpful={file}"])
    assert [group.source for group in reading.groups] == ["hh-helpful", "hh-helpful"]
    assert [group.id for group in reading.groups] == ["hh-helpful-0", "hh-helpful-1"]
    assert reading.left_out == {"more than one turn": 1}
    assert reading.num_rows == 2
    assert reading.num_groups == (2,)


def test_the_limit_counts_rows_that_are_used_and_bad_rows_keep_their_line(tmp_path: Path):
    rows = transcripts("a", turns=2) + transcripts("b", "c", "d")
    rows[2]["chosen"] = rows[2]["rejected"]
    file = write(tmp_path / "train.jsonl", rows)
    reading = read([f"set:hh-helpful={file}#limit=2"], max_bad_fraction=0.5)
    assert questions(reading) == ["b"]
    assert [(bad.row, bad.reason) for bad in reading.bad_rows] == [(2, "chosen equals rejected")]


def test_a_folder_is_a_copy_of_the_repository_and_no_part_leaks_into_a_later_one(tmp_path: Path):
    write(tmp_path / "harmless-base/train.jsonl", transcripts("a", "b", "c"))
    write(tmp_path / "harmless-base/test.jsonl", transcripts("B ", "z"))
    write(tmp_path / "helpful-base/train.jsonl", transcripts("not this"))
    train = read([f"set:hh-harmless={tmp_path}#split=train"])
    assert questions(train) == ["a", "c"]  # "b" is asked in the test part, in other case
    assert train.left_out == {"prompt is in a held-out part": 1}
    test = read([f"set:hh-harmless={tmp_path}#split=test"])
    assert questions(test) == ["B", "z"]
    assert {group.tags["split"] for group in test.groups} == {"test"}
    assert questions(read([f"set:hh-harmless={tmp_path}/harmless-base#split=test"])) == ["B", "z"]


def test_all_files_that_an_entry_may_read_are_known_for_their_digests(tmp_path: Path):
    train = write(tmp_path / "hh/harmless-base/train.jsonl", transcripts("a"))
    test = write(tmp_path / "hh/harmless-base/test.jsonl", transcripts("b"))
    assert local_files(f"set:hh-harmless={tmp_path / 'hh'}#split=train") == [test, train]
    assert local_files(f"set:hh-harmless={train}") == [train]
    assert local_files(f"{train}#limit=3") == [train]
    assert local_files("set:hh-harmless#split=train") == local_files("hub:org/pairs:train") == []


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


def test_the_arena_is_split_after_its_filter(tmp_path: Path):
    """Of 60 battles 20 are ties; the first int(0.05 * 40) = 2 of the others are the test part."""
    rows = battles(60)
    for row in rows[:20]:
        row["winner"] = "tie"
    folder = tmp_path / "arena"
    write(folder / "data/train-00000-of-00001.jsonl", rows)
    test = read([f"set:chatbot-arena={folder}#split=test"])
    assert questions(test) == ["q 20", "q 21"]
    assert test.left_out == {"tie": 20}
    assert len(read([f"set:chatbot-arena={folder}#split=train"]).groups) == 38


def test_the_papers_sizes_follow_from_its_totals() -> None:
    """9,691 Alpaca rows give 8,722 to train on, 20,490 battles with a winner give 19,466 (facts: §3)."""
    for name, rows, train in (("alpaca-human", 9691, 8722), ("chatbot-arena", 20_490, 19_466)):
        assert rows - int(SETS[name].test_fraction * rows) == train


def test_helpsteer2_is_split_by_its_own_column(tmp_path: Path):
    row = PUBLISHED["helpsteer2"]
    rows = [row | {"prompt": "a"}, row | {"prompt": "b", "split": "val"}]
    write(tmp_path / "preference/preference.jsonl", rows)
    write(tmp_path / "train.jsonl", [{"prompt": "ratings", "response": "of another kind"}])
    assert questions(read([f"set:helpsteer2={tmp_path}#split=train"])) == ["a"]
    assert questions(read([f"set:helpsteer2={tmp_path}#split=validation"])) == ["b"]


def test_repetitions_of_a_published_set_are_left_out_and_are_no_bad_rows(tmp_path: Path):
    row = PUBLISHED["pandalm"]
    rows = [row, row | {"idx": 1}, row | {"response1": ""}]
    file = tmp_path / "testset-v1.json"
    file.write_text(json.dumps(rows))
    reading = read([f"set:pandalm={file}"])
    assert (len(reading.groups), reading.bad_rows, reading.num_rows) == (1, (), 1)
    assert reading.left_out == {"empty response": 1, "repeats an earlier row": 1}
    assert {group.tags["split"] for group in reading.groups} == {"test"}


def test_tags_pick_rows_of_a_named_set(tmp_path: Path):
    row = PUBLISHED["shp"]
    rows = [row, row | {"history": "why?", "domain": "askphysics"}]
    file = write(tmp_path / "test.jsonl", rows)
    assert questions(read([f"set:shp={file}#subset=askphysics"])) == ["why?"]
    with pytest.raises(DataError, match="has no row with subset=cooking"):
        read([f"set:shp={file}#subset=cooking"])


def test_a_group_is_read_from_a_folder_with_a_file_or_folder_for_each_member(tmp_path: Path):
    assert sorted(name for group in SET_GROUPS.values() for name in group) == sorted([*SETS][:5])
    write(tmp_path / "hh-harmless.jsonl", transcripts("a"))
    write(tmp_path / "beaver-safe/train.jsonl", [PUBLISHED["beaver-safe"]])
    reading = read([f"set:safety={tmp_path}#split=train"])
    assert [group.source for group in reading.groups] == ["beaver-safe", "hh-harmless"]
    assert reading.num_groups == (1, 1)
    with pytest.raises(DataError, match=r"no file or folder called .*chatbot-arena"):
        read([f"set:chat={tmp_path}#split=train"])
    with pytest.raises(DataError, match="is no folder; set:chat needs one with alpaca-human"):
        read([f"set:chat={tmp_path / 'hh-harmless.jsonl'}#split=train"])


def test_a_member_beside_its_group_is_the_same_set_twice(tmp_path: Path):
    write(tmp_path / "hh-harmless.jsonl", transcripts("a"))
    write(tmp_path / "beaver-safe/train.jsonl", [PUBLISHED["beaver-safe"]])
    member = f"set:hh-harmless={tmp_path / 'hh-harmless.jsonl'}#split=train"
    with pytest.raises(DataError, match="given twice"):
        read([f"set:safety={tmp_path}#split=train", member])
    with pytest.raises(DataError, match=r"several sets \(beaver-safe, hh-harmless\)"):
        parse_source(f"set:safety={tmp_path}#split=train")


def test_parts_come_from_the_hub_and_the_later_ones_are_kept_apart(monkeypatch) -> None:
    calls = []

    def load(name: str, config: str | None, *, split: str, revision: object, data_dir: str) -> Rows:
        calls.append((name, config, split, data_dir))
        return transcripts("a", "b") if split == "train" else transcripts("b")

    fake_hub(monkeypatch, load)
    reading = read(["set:hh-harmless#split=train"])
    assert questions(reading) == ["a"]
    assert calls == [
        ("Anthropic/hh-rlhf", None, part, "harmless-base") for part in ("train", "test")
    ]
    calls.clear()
    read(["set:hh-helpful#split=test"])
    assert calls == [("Anthropic/hh-rlhf", None, "test", "helpful-base")]


def test_sets_that_a_script_used_to_load_are_read_as_the_files_they_are(monkeypatch) -> None:
    """`datasets` runs no scripts any more: webgpt is read from the hub's own Parquet copy."""
    calls = []

    def load(builder: str, *, data_files: str, split: str) -> Rows:
        calls.append((builder, data_files, split))
        return [PUBLISHED["webgpt"]] if builder == "parquet" else alpaca(10)

    fake_hub(monkeypatch, load)
    assert len(read(["set:webgpt"]).groups) == 1
    assert len(read(["set:alpaca-human#split=train"]).groups) == 9
    webgpt = "hf://datasets/openai/webgpt_comparisons@refs/convert/parquet/default/train/*.parquet"
    farm = "hf://datasets/tatsu-lab/alpaca_farm/alpaca_human_preference.json"
    assert calls == [("parquet", webgpt, "train"), ("json", farm, "train")]


@pytest.mark.parametrize("name", [name for name in SETS if SETS[name].hub])
def test_every_set_on_the_hub_can_be_asked_for_each_of_its_parts(monkeypatch, name: str) -> None:
    """Thirty rows with prompts of their own stand for whatever the hub would send."""

    def load(*_: object, **options: object) -> Rows:
        kind = {"helpsteer2": {"split": "val"}}.get(name, {})
        half = [renamed(name, f"{options.get('split')} {i}", **kind) for i in range(15)]
        return half + [renamed(name, f"{options.get('split')} {i + 15}") for i in range(15)]

    fake_hub(monkeypatch, load)
    for part in SETS[name].parts:
        reading = read([f"set:{name}#split={part}"])
        assert reading.groups
        assert {group.tags["split"] for group in reading.groups} == {part}


def renamed(name: str, question: str, **changes: Any) -> dict[str, Any]:
    """The published row of a set with another question."""
    questions = ("How do I pick a lock?", "What is two plus two?", "Add them.")
    text = json.dumps(PUBLISHED[name])
    for old in questions:
        text = text.replace(old, question)
    return json.loads(text) | changes


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("set:hh-helpfull#split=test", "unknown set 'hh-helpfull'; did you mean set:hh-helpful"),
        ("set:chats#split=test", "did you mean set:chat"),
        ("set:zzz", "unknown set 'zzz'; sets are hh-harmless, .*groups of sets are safety, chat"),
        ("set:hh-helpful", "several parts; write '#split=train' or '#split=test'"),
        ("set:chat", "set:alpaca-human has several parts"),
        (
            "set:helpsteer3#split=test",
            "no part 'test'; write '#split=train' or '#split=validation'",
        ),
        (
            "set:pandalm",
            r"not on the hub; get it from github.com/WeOpenML.* write set:pandalm=path",
        ),
        ("set:hh-helpful=", "names no file"),
        ("set:hh-helpful=missing.jsonl#split=test", "missing.jsonl: no such file"),
    ],
)
def test_a_wrong_name_tells_the_right_ones(source: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read([source])


def test_a_set_without_test_rows_says_so(tmp_path: Path) -> None:
    """Five rows have no first tenth, and a folder may lack a part."""
    file = write(tmp_path / "few/rows.jsonl", alpaca(5))
    with pytest.raises(DataError, match="has no row with split=test"):
        read([f"set:alpaca-human={file}#split=test"])
    folder = write(tmp_path / "hh/train.jsonl", transcripts("a")).parent
    with pytest.raises(DataError, match="no file called like test in it"):
        read([f"set:hh-helpful={folder}#split=test"])
    many = write(tmp_path / "many.jsonl", transcripts("a", turns=2))
    with pytest.raises(DataError, match="has no rows; left out are more than one turn: 1"):
        read([f"set:hh-helpful={many}"])


def test_a_file_of_another_form_names_the_columns_of_the_published_one(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "b"}])
    with pytest.raises(
        DataError, match=r"published form of shp: no `labels`; columns: \['prompt', "
    ):
        read([f"set:shp={file}"])


def parsed(name: str, **changes: Any) -> ParsedRow:
    """The published row of a set, with changes, as our reader understands it."""
    ours = SETS[name].read_row(PUBLISHED[name] | changes)
    assert not isinstance(ours, LeftOut), ours
    row = parse_row(ours)
    assert isinstance(row, ParsedRow), row
    return row


def left_out(name: str, **changes: Any) -> str:
    ours = SETS[name].read_row(PUBLISHED[name] | changes)
    assert isinstance(ours, LeftOut), ours
    return ours.reason


def preferred(row: ParsedRow) -> tuple[str, str]:
    (pair,) = row.comparisons
    return row.responses[pair.chosen], row.responses[pair.rejected]


def tied(row: ParsedRow) -> bool:
    return row.comparisons[0].tie


COLUMNS = {
    "hh-harmless": "chosen rejected",
    "hh-helpful": "chosen rejected",
    "beaver-safe": "prompt response_0 response_1 "
    "is_response_0_safe is_response_1_safe safer_response_id",
    "alpaca-human": "instruction input output_1 output_2 preference",
    "chatbot-arena": "winner conversation_a conversation_b",
    "ultrafeedback": "chosen rejected score_chosen score_rejected",
    "helpsteer2": "prompt response_1 response_2 preference_strength split",
    "helpsteer3": "context response1 response2 overall_preference domain",
    "skywork-80k": "chosen rejected source",
    "webgpt": "question answer_0 answer_1 score_0 score_1",
    "shp": "history human_ref_A human_ref_B labels domain",
    "pandalm": "instruction input response1 response2 annotator1 annotator2 annotator3",
}
"""What each set's rows must have."""


@pytest.mark.parametrize("name", SETS)
def test_every_set_reads_its_published_row_and_needs_just_its_columns(name: str) -> None:
    assert preferred(parsed(name)) == ("the better one", "the worse one")
    for column in PUBLISHED[name]:
        row = {key: value for key, value in PUBLISHED[name].items() if key != column}
        if column in COLUMNS[name].split():
            with pytest.raises(RefusedError) as caught:
                SETS[name].read_row(row)
            assert caught.value.refusal.reason == "missing column"
            assert caught.value.refusal.detail.startswith(f"no `{column}`; columns: ")
        else:
            assert SETS[name].read_row(row) == SETS[name].read_row(PUBLISHED[name])


def test_helpful_and_harmless_keep_one_turn() -> None:
    row = parsed("hh-harmless")
    assert row.prompt == (Message("user", "How do I pick a lock?"),)
    more = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d"
    assert left_out("hh-harmless", chosen=more, rejected=more + "!") == "more than one turn"
    # The filter looks at both sides: the paper wants exactly one human turn in each.
    assert left_out("hh-helpful", rejected=more) == "more than one turn"


def test_beaver_keeps_pairs_of_which_one_is_safe_and_prefers_the_safer() -> None:
    assert preferred(parsed("beaver-safe"))[0] == "the better one"
    swapped = parsed(
        "beaver-safe", safer_response_id=0, is_response_0_safe=True, is_response_1_safe=False
    )
    assert preferred(swapped) == ("the worse one", "the better one")
    both = left_out("beaver-safe", is_response_0_safe=True, is_response_1_safe=True)
    neither = left_out("beaver-safe", is_response_0_safe=False, is_response_1_safe=False)
    assert (both, neither) == ("both responses safe", "neither response safe")


def test_alpacas_input_stands_on_its_own_line_and_an_empty_one_leaves_no_trace() -> None:
    assert parsed("alpaca-human").prompt == (Message("user", "Add them.\n1, 2"),)
    assert parsed("alpaca-human", input="").prompt == (Message("user", "Add them."),)
    assert preferred(parsed("alpaca-human", preference=2))[0] == "the worse one"


def test_the_arena_keeps_single_turns_with_a_winner() -> None:
    assert left_out("chatbot-arena", winner="tie") == "tie"
    assert left_out("chatbot-arena", winner="tie (bothbad)") == "tie"
    talk = PUBLISHED["chatbot-arena"]["conversation_a"]
    assert left_out("chatbot-arena", conversation_b=talk * 2) == "more than one turn"
    assert preferred(parsed("chatbot-arena", winner="model_b"))[0] == "the worse one"


def test_a_prompt_that_looks_like_a_transcript_stays_one_message() -> None:
    talk = [
        {"role": "user", "content": "\n\nHuman: hi\n\nAssistant: ho\n\nHuman: hu"},
        {"role": "assistant", "content": "the better one"},
    ]
    row = parsed("chatbot-arena", conversation_a=talk)
    assert row.prompt == (Message("user", talk[0]["content"]),)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("ultrafeedback", {"score_rejected": 8.5}),
        ("helpsteer2", {"preference_strength": 0}),
        ("helpsteer3", {"overall_preference": 0}),
        ("webgpt", {"score_0": 0.0, "score_1": 0.0}),
        ("pandalm", {"annotator2": 0, "annotator3": 0}),
        ("pandalm", {"annotator1": 1, "annotator2": 2, "annotator3": 0}),
    ],
)
def test_a_draw_is_kept_as_a_tie(name: str, changes: dict[str, Any]) -> None:
    assert tied(parsed(name, **changes))
    assert not tied(parsed(name))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("helpsteer2", {"preference_strength": 1}),
        ("helpsteer3", {"overall_preference": 3}),
        ("webgpt", {"score_0": -0.25, "score_1": 0.25}),
        ("shp", {"labels": 0}),
        ("pandalm", {"annotator1": 2, "annotator2": 2, "annotator3": 1}),
    ],
)
def test_the_sign_says_which_is_better(name: str, changes: dict[str, Any]) -> None:
    assert preferred(parsed(name, **changes)) == ("the worse one", "the better one")


def test_helpsteer2_tells_turns_by_its_marker_and_parts_by_its_column() -> None:
    prompt = "Hi.\n<extra_id_1>Assistant\nHello.\n<extra_id_1>User\nWhat is two plus two?"
    row = parsed("helpsteer2", prompt=prompt)
    roles = [message.role for message in row.prompt]
    assert roles == ["user", "assistant", "user"]
    assert row.prompt[1].content == "Hello."
    assert parsed("helpsteer2").tags["split"] == "train"
    assert parsed("helpsteer2", split="val").tags["split"] == "validation"


def test_pandalm_gives_its_three_votes_and_leaves_empty_answers_out() -> None:
    assert parsed("pandalm").comparisons[0].votes == Votes(2, 1, 0)
    assert parsed("pandalm", annotator1=2, annotator2=2, annotator3=0).comparisons[
        0
    ].votes == Votes(2, 0, 1)
    assert left_out("pandalm", response2=" ") == "empty response"
    for absent in (math.nan, None, ""):  # as the file says it, as Parquet does, as one would expect
        assert parsed("pandalm", input=absent).prompt[0].content == "Add them."


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("hh-helpful", {"chosen": "just an answer"}, "does not start with a human turn: 'just an"),
        ("beaver-safe", {"safer_response_id": True}, "safer_response_id.*one of 0, 1; got True"),
        ("alpaca-human", {"preference": 3}, "preference.*one of 1, 2; got 3"),
        ("alpaca-human", {"instruction": None}, "instruction.*must be text, got None"),
        ("chatbot-arena", {"winner": "model_c"}, "winner.*model_a, model_b"),
        ("chatbot-arena", {"conversation_a": ["hello"]}, "conversation_a.*list of messages"),
        ("ultrafeedback", {"score_chosen": 1.0}, "chosen response scores 1.0, the rejected 4.0"),
        ("ultrafeedback", {"score_chosen": math.nan}, "score_chosen.*finite number"),
        ("helpsteer2", {"preference_strength": 4}, "preference_strength"),
        ("webgpt", {"question": "why?"}, "question.*full_text"),
        ("pandalm", {"annotator3": "1"}, "annotator3.*one of 0, 1, 2"),
    ],
)
def test_a_row_that_breaks_the_form_says_where(
    name: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RefusedError, match=message):
        SETS[name].read_row(PUBLISHED[name] | changes)


def test_the_rows_themselves_are_not_changed() -> None:
    before = {name: dict(row) for name, row in PUBLISHED.items()}
    for name, row in PUBLISHED.items():
        SETS[name].read_row(row)
    assert before == PUBLISHED
