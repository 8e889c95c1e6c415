"""Row shapes: what each understood shape says, and the reason for which every broken row is refused."""

import json
import math
from typing import Any, get_args

import pytest

from hafrm.data import files
from hafrm.data.files import Reason, Refusal
from hafrm.data.parse import MAX_RANKED, parse_row
from hafrm.preferences import Comparison, Group, Message, Votes

USER = Message("user", "Why is the sky blue?")
ASKED = {"role": "user", "content": "Why is the sky blue?"}
PAIR = {"prompt": "Why is the sky blue?", "chosen": "Scattering.", "rejected": "Paint."}


def said(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


MESSAGES = {"prompt": [ASKED], "chosen": [said("Scattering.")], "rejected": [said("Paint.")]}


def good(row: object, **options: Any) -> Group:
    parsed = parse_row(row, **options)
    assert isinstance(parsed, Group), parsed
    return parsed


def reason(row: object, **options: Any) -> str:
    refusal = parse_row(row, **options)
    assert isinstance(refusal, Refusal), refusal
    assert refusal.reason in get_args(Reason)
    assert refusal.detail.isprintable() and len(refusal.detail) < 1000
    return refusal.reason


@pytest.mark.parametrize(
    "row",
    [
        PAIR,
        PAIR | {"prompt": [ASKED]},
        PAIR | {"prompt": [ASKED], "chosen": [said("Scattering.")], "rejected": [said("Paint.")]},
        PAIR | {"chosen": [said("Scattering.")], "rejected": "Paint."},
        PAIR | {"chosen": said("Scattering.")},
        PAIR | {"prompt": (USER,), "chosen": (Message("assistant", "Scattering."),)},
        # the prompt repeated in the sides, as in binarised UltraFeedback
        PAIR | {"chosen": [ASKED, said("Scattering.")], "rejected": [ASKED, said("Paint.")]},
        {"chosen": [ASKED, said("Scattering.")], "rejected": [ASKED, said("Paint.")]},
        {
            "chosen": "\n\nHuman: Why is the sky blue?\n\nAssistant: Scattering.",
            "rejected": "\n\nHuman: Why is the sky blue?\n\nAssistant: Paint.\n",
        },
        {  # no blank line before the first turn
            "chosen": "Human: Why is the sky blue?\n\nAssistant: Scattering.",
            "rejected": "Human: Why is the sky blue?\n\nAssistant: Paint.",
        },
        PAIR | {"prompt": "\n\nHuman: Why is the sky blue?\n\nAssistant:"},
        PAIR | {"prompt": "\n\nHuman: Why is the sky blue?"},
        {"chosen": "Why is the sky blue?\nScattering.", "rejected": "Why is the sky blue?\nPaint."},
        {"prompt": [ASKED], "responses": ["Scattering.", "Paint."], "ranks": [1, 2]},
        {key: json.dumps(value) for key, value in MESSAGES.items()},
        {  # the same without a column for the prompt
            side: json.dumps([ASKED, *MESSAGES[side]], indent=1) for side in ("chosen", "rejected")
        },
        PAIR | {"chosen": [said([{"type": "text", "text": t} for t in ("Scat", "tering.")])]},
        {"prompt": "Why is the sky blue?", "responses": ["Scattering.", "Paint."], "scores": [5, 2.5]},
    ],
)  # fmt: skip
def test_every_shape_of_the_same_pair_reads_the_same(row: dict[str, Any]) -> None:
    parsed = good(row)
    assert parsed.prompt == (USER,)
    assert parsed.responses == ("Scattering.", "Paint.")
    assert parsed.comparisons == (Comparison(0, 1),)


def test_a_multi_turn_transcript_keeps_all_turns_and_strips_each() -> None:
    start = "\n\nHuman: Hi\n\nAssistant: Hello! \n\nHuman: Line one\n\nline two"
    parsed = good(
        {"chosen": start + "\n\nAssistant:  Yes.\n\nTwo.", "rejected": start + "\n\nAssistant: N"}
    )
    assert parsed.prompt == (
        Message("user", "Hi"),
        Message("assistant", "Hello!"),
        Message("user", "Line one\n\nline two"),
    )
    assert parsed.responses == ("Yes.\n\nTwo.", "N")


def test_turns_between_the_prompt_and_the_response_join_the_prompt() -> None:
    more = [said("Physics?"), {"role": "user", "content": "Yes."}]
    row = PAIR | {"chosen": [*more, said("Scattering.")], "rejected": [*more, said("Paint.")]}
    assert good(row).prompt == (USER, Message("assistant", "Physics?"), Message("user", "Yes."))


def test_a_repeated_prompt_may_have_a_system_message_before_it() -> None:
    tools = [said("looking it up"), {"role": "tool", "content": "42"}]
    whole = [{"role": "system", "content": "Be brief."}, ASKED, *tools, tools[1], ASKED]
    row = PAIR | {"chosen": [*whole, said("Scattering.")], "rejected": [*whole, said("Paint.")]}
    roles = [message.role for message in good(row).prompt]
    assert roles == ["system", "user", "assistant", "tool", "tool", "user"]


def test_responses_with_an_explicit_prompt_are_kept_to_the_letter() -> None:
    parsed = good(
        PAIR | {"chosen": "  \tScattering.\n", "rejected": "Human: Paint.\n\nAssistant: x"}
    )
    assert parsed.responses == ("  \tScattering.\n", "Human: Paint.\n\nAssistant: x")


def test_ranked_responses_make_all_pairs_and_keep_ties() -> None:
    """Ranks 2, 1, 1, 3: b = c > a > d, so six pairs of which (b, c) is a tie."""
    row = {"prompt": "p", "responses": ["a", "b", "c", "d"], "ranking": [2, 1, 1, 3], "weight": 0.5}
    pairs = {(c.chosen, c.rejected, c.tie) for c in good(row).comparisons}
    assert pairs == {
        (1, 0, False), (2, 0, False), (0, 3, False), (1, 2, True), (1, 3, False), (2, 3, False)
    }  # fmt: skip
    assert {c.weight for c in good(row).comparisons} == {0.5}


def test_one_text_twice_among_ranked_responses_is_not_compared_with_itself() -> None:
    row = {"prompt": "p", "responses": ["a", "b", "a"], "scores": [1, 0, 1]}
    assert good(row).comparisons == (Comparison(0, 1), Comparison(2, 1))
    assert reason(row | {"scores": [1, 0, 2]}) == "chosen equals rejected"


def test_margin_weight_votes_tie_id_and_tags_are_taken_along() -> None:
    extra = {"margin": -1.5, "weight": 2, "votes": {"chosen": 3, "rejected": 1, "tie": None}}
    tags = {"split": "train", "subset": 7, "source": "forum", "label": "human"}
    parsed = good(PAIR | extra | tags | {"id": 12, "unknown": object()})
    assert parsed.id == "12"
    assert parsed.tags == tags | {"subset": "7"}
    assert parsed.comparisons == (Comparison(0, 1, margin=-1.5, weight=2.0, votes=Votes(3, 1, 0)),)
    assert good(PAIR | {"margin": None}).comparisons == good(PAIR | {"margin": 0}).comparisons
    assert good(PAIR | {"votes": [2, 2, 1]}).comparisons[0].votes == Votes(2, 2, 1)
    assert good(PAIR | {"votes": (2, 3.0)}).comparisons[0].votes == Votes(2, 3, 0)


TIES = ("Tie", "tie (bothbad)", "both_bad", "both bad", "tie (both good)", "draw", "Equal", "same")
NO_TIES = ("", "model_a", "B", "chosen", "slightly better", "human", "ai:gpt-4", 1)


@pytest.mark.parametrize("tie", [{"tie": True}, *({"label": label} for label in TIES)])
def test_a_tie_is_kept_and_named(tie: dict[str, Any]) -> None:
    assert good(PAIR | tie).comparisons == (Comparison(0, 1, tie=True),)


@pytest.mark.parametrize("label", NO_TIES)
def test_a_label_may_name_the_winner_or_who_labelled(label: object) -> None:
    assert good(PAIR | {"label": label}).comparisons == (Comparison(0, 1),)


@pytest.mark.parametrize(
    "row",
    [
        PAIR | {"label": "what?", "margin": None, "tie": "perhaps"},
        PAIR | {"weight": math.nan, "label": []},
        {"prompt": PAIR["prompt"], "responses": ["Scattering.", "Paint."], "scores": [1, None]},
    ],
)
def test_where_no_label_is_needed_none_is_a_fault(row: dict[str, Any]) -> None:
    assert reason(row)
    parsed = good(row, need_comparisons=False, read_labels=False)
    assert parsed.responses == ("Scattering.", "Paint.") and parsed.comparisons == ()
    asked = good(PAIR | {"chosen": "", "rejected": 3}, need_comparisons=False, need_responses=False)
    assert (asked.prompt, asked.responses) == ((USER,), ())


def test_a_system_column_is_the_system_turn() -> None:
    system = Message("system", "Be brief.")
    assert good(PAIR | {"system": "Be brief."}).prompt == (system, USER)
    both = PAIR | {"system": "Be brief.", "prompt": [system._asdict(), ASKED]}
    assert good(both).prompt == (system, USER)
    null = [{"role": "system", "content": None}, ASKED]
    assert good(PAIR | {"system": " ", "prompt": null}).prompt == (USER,)


def test_context_that_is_empty_or_repeats_the_prompt_is_no_fault() -> None:
    row = PAIR | {"tools": [], "images": None, "input": "", "instruction": PAIR["prompt"]}
    assert good(row) == good(PAIR)


def test_an_implicit_prompt_of_one_sentence_is_split_between_words_on_request() -> None:
    row = {"chosen": "The sky is blue.", "rejected": "The sky is black."}
    assert reason(row) == "missing column"
    parsed = good(row, implicit_prompt="words")
    assert parsed.prompt == (Message("user", "The sky is"),)
    assert parsed.responses == ("blue.", "black.")


def test_text_that_only_looks_like_messages_stays_text() -> None:
    answers = {"chosen": '[{"content": "a"}]', "rejected": '[{"content": "b"} and so on'}
    assert good(PAIR | answers).responses == tuple(answers.values())


def test_rows_without_labels_are_understood_only_when_asked_for() -> None:
    one, many = {"prompt": "p", "response": "a"}, {"prompt": "p", "responses": ["b", "a", "b"]}
    assert good(one, need_comparisons=False).responses == ("a",)
    assert good(many, need_comparisons=False).responses == ("b", "a", "b")
    assert good(PAIR, need_comparisons=False).comparisons == (Comparison(0, 1),)
    assert reason(one) == reason(many) == "missing column"


def nested(depth: int) -> Any:
    value: Any = "x"
    for _ in range(depth):
        value = [{"content": value}]
    return value


HOSTILE = [None, 3, True, b"bytes", {}, {"a": 1}, [], [[]], [["x"]], [None], {1, 2}, nested(500)]


@pytest.mark.parametrize("column", ["prompt", "chosen", "rejected"])
@pytest.mark.parametrize("value", HOSTILE)
def test_a_value_of_the_wrong_type_is_refused_and_never_raises(column: str, value: Any) -> None:
    assert reason(PAIR | {column: value}) in {"not a string", "wrong roles", "missing column"}


@pytest.mark.parametrize("value", HOSTILE[1:])
@pytest.mark.parametrize("column", ["responses", "response"])
def test_hostile_lists_of_responses_are_refused_and_never_raise(column: str, value: Any) -> None:
    assert reason({"prompt": "p", column: value, "ranks": value}, need_comparisons=False)


@pytest.mark.parametrize("row", [*HOSTILE, "text", [PAIR]])
def test_what_is_no_row_is_refused(row: Any) -> None:
    assert reason(row) == ("missing column" if isinstance(row, dict) else "unreadable row")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"chosen": ""}, "empty response"),
        ({"prompt": "  "}, "empty prompt"),
        ({"prompt": []}, "missing column"),
        ({"chosen": "Paint."}, "chosen equals rejected"),
        (
            {"chosen": [{"role": "user", "content": "Other?"}, said("Scattering.")]},
            "prompts differ",
        ),
        ({"chosen": [ASKED, said("Eh?"), ASKED, said("Scattering.")]}, "prompts differ"),
        ({"chosen": [ASKED]}, "wrong roles"),
        ({"chosen": [{"role": "gpt", "content": "x"}]}, "wrong roles"),
        ({"prompt": [ASKED, said("x")]}, "wrong roles"),
        ({"prompt": [ASKED, said("x"), said("y"), ASKED]}, "wrong roles"),
        ({"prompt": [{"content": "x"}]}, "wrong roles"),
        ({"prompt": "\n\nHuman: a\n\nAssistant: b"}, "wrong roles"),
        (
            {"prompt": [{"role": "user", "content": [{"type": "image", "text": "x"}]}]},
            "not a string",
        ),
        ({"label": "tiebreak"}, "unknown label"),
        ({"label": "rejected"}, "unknown label"),
        ({"tools": [{"name": "weather"}]}, "unread context"),
        ({"history": [["a", "b"]]}, "unread context"),
        ({"system": 3}, "not a string"),
        ({"system": "a", "prompt": [{"role": "system", "content": "b"}, ASKED]}, "wrong roles"),
        ({"prompt": '[{"role": "user", "content"'}, "unreadable row"),
        ({"prompt": [ASKED, said("") | {"tool_calls": [{}]}, ASKED]}, "not a string"),
        ({"chosen": math.nan}, "not a string"),
        ({"id": []}, "not a string"),
        ({"split": {"a": 1}}, "not a string"),
        ({"margin": math.nan}, "non-finite margin"),
        ({"margin": 10**400}, "non-finite margin"),
        ({"margin": 1e300}, "non-finite margin"),  # a loss would overflow in float32
        ({"weight": 1e300}, "non-finite margin"),
        ({"weight": -0.5}, "non-finite margin"),
        ({"votes": [1]}, "bad number"),
        ({"votes": [1, -0.5]}, "bad number"),
        ({"votes": {"chosen": 1}}, "bad number"),
        ({"votes": {"chosen": 1, "rejected": 1, 3: 1}}, "bad number"),
        ({"tie": "yes"}, "bad number"),
        ({"chosen": "x" * 201}, "too long"),
        ({"prompt": [ASKED | {"content": "x" * 150}, said("y" * 60), ASKED]}, "too long"),
        ({"chosen": "a\ud800b"}, "unusable character"),
        ({"prompt": "\udfff"}, "unusable character"),
        ({"prompt": "a\0b"}, "unusable character"),
    ],
)
def test_each_broken_rule_has_its_reason(monkeypatch, change, expected: str) -> None:
    monkeypatch.setattr(files, "MAX_CHARS", 200)
    assert reason(PAIR | change) == expected


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "p", "chosen": "a"}, "missing column"),
        ({"chosen": "I am sure: yes.", "rejected": "I am sure: no."}, "missing column"),
        ({"chosen": [said("a")], "rejected": [said("b")]}, "missing column"),
        ({"chosen": "Hi\n\nAssistant: a", "rejected": "Hi\n\nAssistant: b"}, "wrong roles"),
        ({"chosen": "\n\nHuman: q\n\nAssistant:", "rejected": "\n\nHuman: q\n\nAssistant: b"},
         "empty response"),
        ({"chosen": "\n\nHuman: q\n\nAssistant: a\n\nHuman: r",
          "rejected": "\n\nHuman: q\n\nAssistant: b"}, "wrong roles"),
        ({"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: r\n\nAssistant: b"},
         "prompts differ"),
        ({"prompt": "p", "responses": ["a", "b"], "ranks": [1]}, "bad number"),
        ({"prompt": "p", "responses": ["a", "b"], "scores": [1, math.nan]}, "bad number"),
        ({"prompt": "p", "responses": ["a", "b"], "scores": [1, 2], "ranks": [2, 1]}, "bad number"),
        ({"prompt": "p", "responses": ["a", "b"], "scores": [1, 2], "votes": [1, 2]}, "bad number"),
        ({"responses": ["a", "b"], "ranks": [1, 2]}, "missing column"),
        ({"prompt": "p", "responses": ["a", ""], "ranks": [1, 2]}, "empty response"),
    ],
)  # fmt: skip
def test_each_broken_shape_has_its_reason(row: dict[str, Any], expected: str) -> None:
    assert reason(row) == expected


def test_a_long_ranking_is_refused_before_its_pairs_are_made() -> None:
    size = MAX_RANKED + 1
    texts = [f"r{index}" for index in range(size)]
    row = {"prompt": "p", "responses": texts, "ranks": list(range(size))}
    assert reason(row) == "too long"
    assert len(good({"prompt": "p", "responses": texts}, need_comparisons=False).responses) == size
