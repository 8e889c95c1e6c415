"""Published preference sets by name: where each is published, and how its rows are converted to ours.

The first five are those of the paper (HAF-RM, arXiv 2407.04185), filtered and split as in its released
code. A new set is one function, one entry in `SETS` and one line in docs/sets.md.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from hafrm.data.files import (
    HubSet,
    NumberedRows,
    RawRow,
    Refusal,
    RefusedError,
    as_number,
    cell_of,
    list_of,
    read_file,
    read_hub,
    refuse,
    show,
)
from hafrm.data.parse import HUMAN, parse_row
from hafrm.data.splits import normalised_key
from hafrm.errors import DataError, did_you_mean
from hafrm.preferences import Group

OurRow = dict[str, Any]


class LeftOut(NamedTuple):
    """Why a good row of a published set is not used; rows are counted by reason."""

    reason: str


_WHOLE = ""  # the part of a set that is published in one piece
_MANY_TURNS = LeftOut("more than one turn")
_HELPSTEER_TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")


@dataclass(frozen=True)
class NamedSet:
    """A published set of preferences, and which of its rows are used."""

    name: str
    read_row: Callable[[RawRow], OurRow | LeftOut]  # raises RefusedError
    hub: dict[str, HubSet]  # where each part is
    parts: tuple[str, ...] = ("train", "test")
    """In this order, prompts are kept apart: an earlier part loses the prompts of later parts."""
    test_fraction: float = 0.0
    """The fraction of rows, from the first on, that is the test part of a set published in one piece."""

    @property
    def in_one_piece(self) -> bool:
        """Whether the parts are distinguished by rows, not by files."""
        return _WHOLE in self.hub


def hh(row: RawRow) -> OurRow | LeftOut:
    """hh-rlhf: two transcripts. The paper keeps dialogues with a single human turn."""
    sides: OurRow = {side: text_of(row, side) for side in ("chosen", "rejected")}
    for side, text in sides.items():
        if not text.startswith(HUMAN):
            refuse("unreadable row", f"`{side}` does not start with a human turn: {show(text)}")
    return _MANY_TURNS if any(text.count(HUMAN) > 1 for text in sides.values()) else sides


def beaver_safe(row: RawRow) -> OurRow | LeftOut:
    """PKU-SafeRLHF. The paper keeps pairs with exactly one safe response, and prefers the safer one."""
    safe = [choice_of(row, f"is_response_{i}_safe", (True, False)) for i in (0, 1)]
    if safe[0] == safe[1]:
        return LeftOut("both responses safe" if safe[0] else "neither response safe")
    safer = choice_of(row, "safer_response_id", (0, 1))
    responses = [text_of(row, "response_0"), text_of(row, "response_1")]
    return _pair(_user(text_of(row, "prompt")), *responses, lead=1 if safer == 0 else -1)


def alpaca_human(row: RawRow) -> OurRow | LeftOut:
    """AlpacaFarm's human preferences; the prompt is the instruction, with its input on a new line."""
    preferred = choice_of(row, "preference", (1, 2))
    responses = [text_of(row, "output_1"), text_of(row, "output_2")]
    more = "" if cell_of(row, "input") is None else text_of(row, "input")
    text = text_of(row, "instruction")
    prompt = _user(f"{text}\n{more}" if more.strip() else text)
    return _pair(prompt, *responses, lead=1 if preferred == 1 else -1)


def chatbot_arena(row: RawRow) -> OurRow | LeftOut:
    """LMSYS Chatbot Arena's 33k conversations. The paper keeps single turns with a winner."""
    winner = choice_of(row, "winner", ("model_a", "model_b", "tie", "tie (bothbad)"))
    talks = [_messages(row, f"conversation_{side}") for side in "ab"]
    if any(len(talk) != 2 for talk in talks):  # the first user message and its answer
        return _MANY_TURNS
    if winner.startswith("tie"):
        return LeftOut("tie")
    prompt, answers = talks[0][:1], [talk[1] for talk in talks]
    return _pair(prompt, [answers[0]], [answers[1]], lead=1 if winner == "model_a" else -1)


def ultrafeedback(row: RawRow) -> OurRow | LeftOut:
    """UltraFeedback as H4 binarized it: two dialogues and their scores; equal scores are a tie."""
    names = ("score_chosen", "score_rejected")
    scores = [as_number(cell_of(row, name), name) for name in names]
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
    ours = _pair(prompt, *responses, lead=-strength)
    return ours | {"split": "train" if split == "train" else "validation"}


def helpsteer3(row: RawRow) -> OurRow | LeftOut:
    """HelpSteer3-Preference: messages, two responses, the same strength; its domain is the subset."""
    responses = [text_of(row, "response1"), text_of(row, "response2")]
    strength = choice_of(row, "overall_preference", range(-3, 4))
    ours = _pair(_messages(row, "context"), *responses, lead=-strength)
    return ours | {"subset": text_of(row, "domain")}


def skywork(row: RawRow) -> OurRow | LeftOut:
    """Skywork-Reward-Preference: two dialogues, and the set that each pair came from."""
    sides = {side: _messages(row, side) for side in ("chosen", "rejected")}
    return {**sides, "source": text_of(row, "source")}


def text_of(row: RawRow, column: str) -> str:
    """The text in a column."""
    value = cell_of(row, column)
    if not isinstance(value, str):
        refuse("not a string", f"`{column}` must be text, got {show(value)}")
    return value


def choice_of(row: RawRow, column: str, allowed: Sequence[Any]) -> Any:
    """The value in a column, which must be one of those allowed, type included."""
    value = cell_of(row, column)
    # 1 == True in Python, but a label 1 is not a label True
    if not any(value == choice and type(value) is type(choice) for choice in allowed):
        choices = ", ".join(map(str, allowed))
        refuse("bad number", f"`{column}` must be one of {choices}; got {show(value)}")
    return value


def _pair(prompt: object, first: object, second: object, *, lead: int) -> OurRow:
    """Our row of two responses; the first is better if it leads, and 0 is a tie."""
    better, worse = (second, first) if lead < 0 else (first, second)
    row: OurRow = {"prompt": prompt, "chosen": better, "rejected": worse}
    return row | {"tie": True} if lead == 0 else row


def _user(text: str) -> list[dict[str, str]]:
    # as a message, or text that looks like a transcript would be split
    return [{"role": "user", "content": text}]


def _messages(row: RawRow, column: str) -> list[dict[str, Any]]:
    """The messages of a column, with only their role and content."""
    turns = list_of(cell_of(row, column), column)
    try:
        return [{"role": turn["role"], "content": turn["content"]} for turn in turns]
    except (TypeError, KeyError):
        refuse("not a string", f"`{column}` must be a list of messages, got {show(turns)}")


def _hub(name: str, *parts: str, end: str = "", **more: Any) -> dict[str, HubSet]:
    """The hub's splits by part, named like the parts (plus `end`); without parts, the set is one piece."""
    whole = {_WHOLE: HubSet(name, **more)}
    return {part: HubSet(name, part + end, **more) for part in parts} or whole


_HALVES, _VALIDATED = ("train", "test"), ("train", "validation")
_HH, _ULTRA = "Anthropic/hh-rlhf", "HuggingFaceH4/ultrafeedback_binarized"
_ALPACA = _hub("tatsu-lab/alpaca_farm", file="alpaca_human_preference.json")
_ARENA = _hub("lmsys/chatbot_arena_conversations")
_HELPSTEER2 = _hub("nvidia/HelpSteer2", folder="preference")
_HELPSTEER3 = _hub("nvidia/HelpSteer3", *_VALIDATED, config="preference")
_SKYWORK = _hub("Skywork/Skywork-Reward-Preference-80K-v0.2")
_SETS = (
    NamedSet("hh-harmless", hh, _hub(_HH, *_HALVES, folder="harmless-base")),
    NamedSet("hh-helpful", hh, _hub(_HH, *_HALVES, folder="helpful-base")),
    NamedSet("beaver-safe", beaver_safe, _hub("PKU-Alignment/PKU-SafeRLHF", *_HALVES)),
    NamedSet("alpaca-human", alpaca_human, _ALPACA, test_fraction=0.10),
    NamedSet("chatbot-arena", chatbot_arena, _ARENA, test_fraction=0.05),
    NamedSet("ultrafeedback", ultrafeedback, _hub(_ULTRA, *_HALVES, end="_prefs")),
    NamedSet("helpsteer2", helpsteer2, _HELPSTEER2, _VALIDATED),
    NamedSet("helpsteer3", helpsteer3, _HELPSTEER3, _VALIDATED),
    NamedSet("skywork-80k", skywork, _SKYWORK, ("train",)),
)
SETS = {named.name: named for named in _SETS}
"""Every named set; the first five are the paper's."""

SET_GROUPS: dict[str, tuple[str, ...]] = {
    "safety": ("beaver-safe", "hh-harmless"),
    "chat": ("alpaca-human", "chatbot-arena", "hh-helpful"),
}
"""The paper's two groups: a model trained on one set of a group is tested on the others."""


def find_sets(location: str, part: str | None) -> list[tuple[NamedSet, str | None]]:
    """(set, file) of "set:name" (from the hub; a group stands for its members) or "set:name=file".

    Raises `DataError` for an unknown name, for a part that the set lacks, and for a missing part.
    """
    name, equals, file = location.removeprefix("set:").partition("=")
    members = [name] if name in SETS else SET_GROUPS.get(name, ())
    if not members:
        names = f"sets are {', '.join(SETS)}; groups of sets are {', '.join(SET_GROUPS)}"
        raise DataError(f"unknown set {name!r}; {did_you_mean(name, [*SETS, *SET_GROUPS])}{names}")
    if equals and (not file or name in SET_GROUPS):
        raise DataError(f"{location!r}: give a file of one set, or the name alone (from the hub)")
    for named in map(SETS.__getitem__, members):
        options = " or ".join(f"'#split={option}'" for option in named.parts)
        if part is not None and part not in named.parts:
            raise DataError(f"set:{named.name} has no part {part!r}; use {options}")
        # a file of a set in several pieces is one of them
        if part is None and len(named.parts) > 1 and not (equals and not named.in_one_piece):
            raise DataError(f"set:{named.name} has several parts; append {options}")
    own = str(Path(file).expanduser()) if equals else None
    return [(SETS[member], own) for member in members]


def read_named_set(
    named: NamedSet, file: str | None, part: str | None, left_out: Counter[str]
) -> NumberedRows:
    """(row number, our row or `Refusal`) of one part of a set, without prompts that a later part also has.

    `left_out` counts unused rows by reason.
    """
    part = part or (named.parts[0] if len(named.parts) == 1 else None)
    later = named.parts[named.parts.index(part) + 1 :] if part else ()
    # a file of a set in several pieces is one of them: the others are not here
    others = () if file and not named.in_one_piece else later
    held_out = {_prompt(r) for name in others for _, r in _rows_of(named, file, name, Counter())}
    held_out -= {None}
    for number, row in _rows_of(named, file, part, left_out):
        if held_out and _prompt(row) in held_out:
            left_out["prompt is in a held-out part"] += 1
        else:
            yield number, {**row, "split": part} if isinstance(row, dict) and part else row


def _rows_of(
    named: NamedSet, file: str | None, part: str | None, left_out: Counter[str]
) -> NumberedRows:
    """The rows of one part in our columns, without those that the set's filter leaves out."""

    def converted(counts: Counter[str]) -> NumberedRows:
        hub = _WHOLE if named.in_one_piece else part or ""
        rows = read_file(Path(file)) if file else read_hub(named.hub[hub], stream=True)
        for number, row in rows:
            ours: object = row  # `parse_row` refuses what is not a row
            if isinstance(row, dict):
                try:
                    ours = named.read_row(row)
                except RefusedError as refused:
                    ours = refused.refusal
            if isinstance(ours, LeftOut):
                counts[ours.reason] += 1
            else:
                yield number, ours

    if not named.in_one_piece:
        yield from converted(left_out)
        return
    num_good = sum(not isinstance(row, Refusal) for _, row in converted(Counter()))
    num_test = int(named.test_fraction * num_good)  # the first good rows
    for number, row in converted(left_out):
        split = row.get("split") if isinstance(row, dict) else None
        if not isinstance(row, Refusal):
            split = "test" if num_test > 0 else split
            num_test -= 1
        if part == (split or named.parts[0]):
            yield number, row


def _prompt(row: object) -> str | None:
    parsed = None if isinstance(row, Refusal) else parse_row(row)
    return normalised_key(parsed.prompt) if isinstance(parsed, Group) else None
