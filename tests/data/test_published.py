"""Rows of named sets, in the columns in which they are published, become rows of ours or say why not."""

import math
from typing import Any

import pytest

from hafrm.data import published
from hafrm.data.catalogue import SETS
from hafrm.data.published import LeftOut
from hafrm.data.rows import ParsedRow, parse_row
from hafrm.data.values import RefusedError
from hafrm.preferences import Message, Votes
from published_rows import PUBLISHED


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


@pytest.mark.parametrize("name", SETS)
def test_every_set_has_a_row_here_with_all_of_its_columns_and_reads_it(name: str) -> None:
    assert set(SETS[name].columns) <= PUBLISHED[name].keys()
    assert preferred(parsed(name)) == ("the better one", "the worse one")


@pytest.mark.parametrize("name", SETS)
def test_every_column_that_is_asked_for_is_read(name: str) -> None:
    """With any one of its columns broken, the row is refused or its meaning changes."""
    whole = parsed(name)
    for column in SETS[name].columns:
        row = PUBLISHED[name] | {column: [object()]}
        try:
            ours = SETS[name].read_row(row)
        except RefusedError:
            continue
        assert not isinstance(ours, LeftOut)
        assert parse_row(ours) != whole, column


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
    assert isinstance(published.hh(PUBLISHED["hh-helpful"]), dict)
