"""Published preference sets by name: how each one's rows become ours, and where it is published.

The first five are those of the paper (HAF-RM, arXiv 2407.04185), filtered and split as its released code
does. A new set is one function that returns the row in our columns (or `LeftOut`, where the set's own
filter takes it out, or raises `RefusedError`), one entry in `SETS` and one line in docs/sets.md. `sources`
reads the files.
"""

import difflib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hafrm.data.files import HubSet
from hafrm.data.parse import HUMAN, RawRow
from hafrm.data.values import LeftOut, cell_of, choice_of, number_of, refuse, show, text_of
from hafrm.errors import DataError

WHOLE = ""
"""The part of a set that is published in one piece."""

OurRow = dict[str, Any]

_MANY_TURNS = LeftOut("more than one turn")
_HELPSTEER_TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")


def hh(row: RawRow) -> OurRow | LeftOut:
    """hh-rlhf: two transcripts. The paper keeps dialogues with a single human turn."""
    sides = {side: text_of(row, side) for side in ("chosen", "rejected")}
    for side, text in sides.items():
        if not text.startswith(HUMAN):
            refuse("unreadable row", f"`{side}` does not start with a human turn: {show(text)}")
    if any(text.count(HUMAN) > 1 for text in sides.values()):
        return _MANY_TURNS
    return dict(sides)


def beaver_safe(row: RawRow) -> OurRow | LeftOut:
    """PKU-SafeRLHF. The paper keeps pairs of which exactly one is safe, and prefers the safer one."""
    safe = [choice_of(row, f"is_response_{i}_safe", (True, False)) for i in (0, 1)]
    if safe[0] == safe[1]:
        return LeftOut("both responses safe" if safe[0] else "neither response safe")
    safer = choice_of(row, "safer_response_id", (0, 1))
    responses = [text_of(row, "response_0"), text_of(row, "response_1")]
    return _pair(_user(text_of(row, "prompt")), *responses, first_is_better=safer == 0)


def alpaca_human(row: RawRow) -> OurRow | LeftOut:
    """AlpacaFarm's human preferences; the prompt is the instruction, with its input on a new line."""
    preferred = choice_of(row, "preference", (1, 2))
    responses = [text_of(row, "output_1"), text_of(row, "output_2")]
    return _pair(_instruction(row), *responses, first_is_better=preferred == 1)


def chatbot_arena(row: RawRow) -> OurRow | LeftOut:
    """LMSYS Chatbot Arena's 33k conversations. The paper keeps single turns with a winner."""
    winner = choice_of(row, "winner", ("model_a", "model_b", "tie", "tie (bothbad)"))
    talks = [_messages(row, f"conversation_{side}") for side in "ab"]
    if any(len(talk) != 2 for talk in talks):  # the first user message and its answer
        return _MANY_TURNS
    if winner.startswith("tie"):
        return LeftOut("tie")
    prompt, answers = talks[0][:1], [talk[1] for talk in talks]
    return _pair(prompt, [answers[0]], [answers[1]], first_is_better=winner == "model_a")


def ultrafeedback(row: RawRow) -> OurRow | LeftOut:
    """UltraFeedback as H4 binarized it: two dialogues and their scores; equal scores are a tie."""
    scores = [number_of(row, f"score_{side}") for side in ("chosen", "rejected")]
    if scores[0] < scores[1]:
        refuse("bad number", f"the chosen response scores {scores[0]}, the rejected {scores[1]}")
    sides = {side: _messages(row, side) for side in ("chosen", "rejected")}
    return {**sides, "tie": scores[0] == scores[1]}


def helpsteer2(row: RawRow) -> OurRow | LeftOut:
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


def helpsteer3(row: RawRow) -> OurRow | LeftOut:
    """HelpSteer3-Preference: messages, two responses, the same strength; its domain is the subset."""
    responses = [text_of(row, "response1"), text_of(row, "response2")]
    strength = choice_of(row, "overall_preference", range(-3, 4))
    return _pair(_messages(row, "context"), *responses, first_is_better=_by_sign(strength)) | {
        "subset": text_of(row, "domain")
    }


def skywork(row: RawRow) -> OurRow | LeftOut:
    """Skywork-Reward-Preference: two dialogues, and the set that each pair came from."""
    sides = {side: _messages(row, side) for side in ("chosen", "rejected")}
    return {**sides, "source": text_of(row, "source")}


def webgpt(row: RawRow) -> OurRow | LeftOut:
    """OpenAI's WebGPT comparisons: two answers whose scores sum to 0; equal scores are a tie."""
    question = cell_of(row, "question")
    if not isinstance(question, Mapping):
        refuse("not a string", f"`question` must hold full_text, got {show(question)}")
    answers = [text_of(row, "answer_0"), text_of(row, "answer_1")]
    gap = number_of(row, "score_1") - number_of(row, "score_0")
    return _pair(_user(text_of(question, "full_text")), *answers, first_is_better=_by_sign(gap))


def shp(row: RawRow) -> OurRow | LeftOut:
    """Stanford Human Preferences: a post and two comments; its domain is the subset."""
    label = choice_of(row, "labels", (0, 1))
    comments = [text_of(row, "human_ref_A"), text_of(row, "human_ref_B")]
    return _pair(_user(text_of(row, "history")), *comments, first_is_better=label == 1) | {
        "subset": text_of(row, "domain")
    }


def pandalm(row: RawRow) -> OurRow | LeftOut:
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


def _instruction(row: RawRow) -> list[dict[str, str]]:
    """An Alpaca instruction; its input may be empty, null or (PandaLM) not a number."""
    extra = cell_of(row, "input")
    absent = extra is None or (isinstance(extra, float) and math.isnan(extra))
    more = "" if absent else text_of(row, "input")
    text = text_of(row, "instruction")
    return _user(f"{text}\n{more}" if more.strip() else text)


def _messages(row: RawRow, column: str) -> list[dict[str, Any]]:
    """A column of messages without what they hold besides role and content."""
    value = cell_of(row, column)
    if not isinstance(value, list | tuple) or not all(
        isinstance(turn, Mapping) and {"role", "content"} <= turn.keys() for turn in value
    ):
        refuse("not a string", f"`{column}` must be a list of messages, got {show(value)}")
    return [{"role": turn["role"], "content": turn["content"]} for turn in value]


@dataclass(frozen=True)
class NamedSet:
    """A published set of preferences and what of it is used."""

    name: str
    read_row: Callable[[RawRow], OurRow | LeftOut]
    hub: dict[str, HubSet] = field(default_factory=dict)
    """Where each part is; a set that is not on the hub must be given as a path."""
    parts: tuple[str, ...] = ("train", "test")
    """In the order in which they are kept apart: no prompt of a later part stays in an earlier one."""
    test_fraction: float = 0.0
    """The first rows that are the test part, where the set is published in one piece."""
    home: str = ""
    """Where to get a set that is not on the hub."""

    @property
    def in_one_piece(self) -> bool:
        """Whether the parts are distinguished by rows, not by files."""
        return WHOLE in self.hub or not self.hub


def find_named_set(name: str) -> NamedSet:
    """The set of that name; raises `DataError` with the nearest name for an unknown one."""
    if name not in SETS:
        near = difflib.get_close_matches(name, [*SETS, *SET_GROUPS], 1)
        hint = f"did you mean set:{near[0]}? " if near else ""
        names = f"sets are {', '.join(SETS)}; groups of sets are {', '.join(SET_GROUPS)}"
        raise DataError(f"unknown set {name!r}; {hint}{names}")
    return SETS[name]


def _hub(name: str, *parts: str, end: str = "", **more: Any) -> dict[str, HubSet]:
    """The hub's splits by part, called as the parts are (with `end` behind)."""
    return {part: HubSet(name, part + end, **more) for part in parts}


_HALVES = ("train", "test")

SETS: dict[str, NamedSet] = {
    entry.name: entry
    for entry in (
        NamedSet("hh-harmless", hh, _hub("Anthropic/hh-rlhf", *_HALVES, folder="harmless-base")),
        NamedSet("hh-helpful", hh, _hub("Anthropic/hh-rlhf", *_HALVES, folder="helpful-base")),
        NamedSet("beaver-safe", beaver_safe, _hub("PKU-Alignment/PKU-SafeRLHF", *_HALVES)),
        NamedSet(
            "alpaca-human",
            alpaca_human,
            {WHOLE: HubSet("tatsu-lab/alpaca_farm", file="alpaca_human_preference.json")},
            test_fraction=0.10,
        ),
        NamedSet(
            "chatbot-arena",
            chatbot_arena,
            {WHOLE: HubSet("lmsys/chatbot_arena_conversations")},
            test_fraction=0.05,
        ),
        NamedSet(
            "ultrafeedback",
            ultrafeedback,
            _hub("HuggingFaceH4/ultrafeedback_binarized", *_HALVES, end="_prefs"),
        ),
        NamedSet(
            "helpsteer2",
            helpsteer2,
            {WHOLE: HubSet("nvidia/HelpSteer2", folder="preference")},
            parts=("train", "validation"),
        ),
        NamedSet(
            "helpsteer3",
            helpsteer3,
            _hub("nvidia/HelpSteer3", "train", "validation", config="preference"),
            parts=("train", "validation"),
        ),
        NamedSet(
            "skywork-80k",
            skywork,
            {WHOLE: HubSet("Skywork/Skywork-Reward-Preference-80K-v0.2")},
            parts=("train",),
        ),
        NamedSet(
            "webgpt",
            webgpt,
            {
                WHOLE: HubSet(
                    "openai/webgpt_comparisons",
                    file="default/train/*.parquet",
                    revision="refs/convert/parquet",
                )
            },
            parts=("train",),
        ),
        NamedSet(
            "shp",
            shp,
            _hub("stanfordnlp/SHP", "train", "validation", "test"),
            parts=("train", "validation", "test"),
        ),
        NamedSet(
            "pandalm",
            pandalm,
            parts=("test",),
            home="github.com/WeOpenML/PandaLM (data/testset-v1.json)",
        ),
    )
}
"""Every named set; the first five are the paper's."""

SET_GROUPS: dict[str, tuple[str, ...]] = {
    "safety": ("beaver-safe", "hh-harmless"),
    "chat": ("alpaca-human", "chatbot-arena", "hh-helpful"),
}
"""The paper's two groups: what is trained on one set of a group is tested on the others."""
