"""Rows of well-known preference data sets, as they were published -> rows that `parse_row` understands.

One pure function for each published form: it returns the row in our columns, or `LeftOut` where the
set's own filter takes the row out (that is no fault of the row), and raises `RefusedError` where the
row breaks the form. Nothing is repaired, and nothing here reads a file.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from hafrm.data.dialogues import HUMAN
from hafrm.data.values import choice_of, number_of, refuse, show, text_of

Row = Mapping[Any, Any]
OurRow = dict[str, Any]


class LeftOut(NamedTuple):
    """Why the set's filter takes a row out, in a few words; rows are counted by it."""

    reason: str


MANY_TURNS = LeftOut("more than one turn")
_HELPSTEER_TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")


def hh(row: Row) -> OurRow | LeftOut:
    """Anthropic's hh-rlhf: two transcripts. The paper keeps dialogues with a single human turn."""
    sides = {side: text_of(row, side) for side in ("chosen", "rejected")}
    for side, text in sides.items():
        if not text.startswith(HUMAN):
            refuse("unreadable row", f"`{side}` does not start with a human turn: {show(text)}")
    if any(text.count(HUMAN) > 1 for text in sides.values()):
        return MANY_TURNS
    return dict(sides)


def beaver_safe(row: Row) -> OurRow | LeftOut:
    """PKU-SafeRLHF. The paper keeps pairs of which exactly one is safe, and prefers the safer one."""
    safe = [choice_of(row, f"is_response_{i}_safe", (True, False)) for i in (0, 1)]
    if safe[0] == safe[1]:
        return LeftOut("both responses safe" if safe[0] else "neither response safe")
    safer = choice_of(row, "safer_response_id", (0, 1))
    responses = [text_of(row, "response_0"), text_of(row, "response_1")]
    return _pair(_user(text_of(row, "prompt")), *responses, first_is_better=safer == 0)


def alpaca_human(row: Row) -> OurRow | LeftOut:
    """AlpacaFarm's human preferences; the prompt is the instruction, with its input on a new line."""
    preferred = choice_of(row, "preference", (1, 2))
    responses = [text_of(row, "output_1"), text_of(row, "output_2")]
    return _pair(_instruction(row), *responses, first_is_better=preferred == 1)


def chatbot_arena(row: Row) -> OurRow | LeftOut:
    """LMSYS Chatbot Arena's 33k conversations. The paper keeps single turns with a winner."""
    winner = choice_of(row, "winner", ("model_a", "model_b", "tie", "tie (bothbad)"))
    talks = [_messages(row, f"conversation_{side}") for side in "ab"]
    if any(len(talk) != 2 for talk in talks):  # the first user message and its answer
        return MANY_TURNS
    if winner.startswith("tie"):
        return LeftOut("tie")
    prompt, answers = talks[0][:1], [talk[1] for talk in talks]
    return _pair(prompt, [answers[0]], [answers[1]], first_is_better=winner == "model_a")


def ultrafeedback(row: Row) -> OurRow | LeftOut:
    """UltraFeedback as H4 binarized it: two dialogues and their scores; equal scores are a tie."""
    scores = [number_of(row, f"score_{side}") for side in ("chosen", "rejected")]
    if scores[0] < scores[1]:
        refuse("bad number", f"the chosen response scores {scores[0]}, the rejected {scores[1]}")
    sides = {side: _messages(row, side) for side in ("chosen", "rejected")}
    return {**sides, "tie": scores[0] == scores[1]}


def helpsteer2(row: Row) -> OurRow | LeftOut:
    """HelpSteer2-Preference: a strength from -3 (the first is much better) to 3; 0 is a tie."""
    turns = _HELPSTEER_TURN.split(text_of(row, "prompt"))
    roles = ["user", *(role.lower() for role in turns[1::2])]
    prompt = [{"role": r, "content": t} for r, t in zip(roles, turns[::2], strict=True)]
    responses = [text_of(row, "response_1"), text_of(row, "response_2")]
    strength = choice_of(row, "preference_strength", range(-3, 4))
    split = choice_of(row, "split", ("train", "val", "validation"))
    return _pair(prompt, *responses, first_is_better=_by_sign(strength)) | {
        "split": "train" if split == "train" else "validation"
    }


def helpsteer3(row: Row) -> OurRow | LeftOut:
    """HelpSteer3-Preference: messages, two responses, the same strength; its domain is the subset."""
    responses = [text_of(row, "response1"), text_of(row, "response2")]
    strength = choice_of(row, "overall_preference", range(-3, 4))
    return _pair(_messages(row, "context"), *responses, first_is_better=_by_sign(strength)) | {
        "subset": text_of(row, "domain")
    }


def skywork(row: Row) -> OurRow | LeftOut:
    """Skywork-Reward-Preference: two dialogues, and the set that each pair came from."""
    sides = {side: _messages(row, side) for side in ("chosen", "rejected")}
    return {**sides, "source": text_of(row, "source")}


def webgpt(row: Row) -> OurRow | LeftOut:
    """OpenAI's WebGPT comparisons: two answers whose scores sum to 0; equal scores are a tie."""
    question = row["question"]
    if not isinstance(question, Mapping) or "full_text" not in question:
        refuse("missing column", f"`question` must hold full_text, got {show(question)}")
    answers = [text_of(row, "answer_0"), text_of(row, "answer_1")]
    gap = number_of(row, "score_1") - number_of(row, "score_0")
    return _pair(_user(text_of(question, "full_text")), *answers, first_is_better=_by_sign(gap))


def shp(row: Row) -> OurRow | LeftOut:
    """Stanford Human Preferences: a post and two comments; its domain is the subset."""
    label = choice_of(row, "labels", (0, 1))
    comments = [text_of(row, "human_ref_A"), text_of(row, "human_ref_B")]
    return _pair(_user(text_of(row, "history")), *comments, first_is_better=label == 1) | {
        "subset": text_of(row, "domain")
    }


def pandalm(row: Row) -> OurRow | LeftOut:
    """PandaLM's test set: three annotators say 1, 2 or 0 (tie); two of them decide, else it is a tie."""
    responses = [text_of(row, "response1"), text_of(row, "response2")]
    if not all(text.strip() for text in responses):
        return LeftOut("empty response")
    votes = [choice_of(row, f"annotator{i}", (0, 1, 2)) for i in (1, 2, 3)]
    first, second, tie = (votes.count(side) for side in (1, 2, 0))
    majority = first - second if max(first, second) > 1 else 0
    counts = [first, second, tie] if majority >= 0 else [second, first, tie]
    return _pair(_instruction(row), *responses, first_is_better=_by_sign(-majority)) | {
        "votes": counts
    }


def _by_sign(strength: int | float) -> bool | None:
    """Whether the first of two is better, where a negative strength says so; None for a tie."""
    return None if strength == 0 else strength < 0


def _pair(prompt: object, first: object, second: object, *, first_is_better: bool | None) -> OurRow:
    better, worse = (second, first) if first_is_better is False else (first, second)
    row: OurRow = {"prompt": prompt, "chosen": better, "rejected": worse}
    return row | {"tie": True} if first_is_better is None else row


def _user(text: str) -> list[dict[str, str]]:
    """One user message, whatever its text looks like (a transcript, say)."""
    return [{"role": "user", "content": text}]


def _instruction(row: Row) -> list[dict[str, str]]:
    """An Alpaca instruction; its input may be empty, null or (PandaLM) not a number."""
    extra = row["input"]
    absent = extra is None or (isinstance(extra, float) and math.isnan(extra))
    more = "" if absent else text_of(row, "input")
    text = text_of(row, "instruction")
    return _user(f"{text}\n{more}" if more.strip() else text)


def _messages(row: Row, column: str) -> list[dict[str, Any]]:
    """A column of messages without what they hold besides role and content."""
    value = row[column]
    if not isinstance(value, list | tuple) or not all(
        isinstance(turn, Mapping) and {"role", "content"} <= turn.keys() for turn in value
    ):
        refuse("not a string", f"`{column}` must be a list of messages, got {show(value)}")
    return [{"role": turn["role"], "content": turn["content"]} for turn in value]
