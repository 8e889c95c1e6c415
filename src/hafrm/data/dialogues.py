"""Prompts and responses out of text, transcripts and message lists.

A side of a comparison may be the bare response, the whole dialogue, or the turns that follow the
prompt; `join` finds the one prompt that all sides share and refuses the row when there is none.
Text is kept as it was written; only the turns of a transcript lose the blanks around them, since
there blanks belong to the notation. No file is read here and no template applied.
"""

import re
from collections.abc import Iterable, Mapping
from itertools import pairwise

from hafrm.data.values import check_text, refuse, show
from hafrm.preferences import Message

Prompt = tuple[Message, ...]

ROLES = ("system", "user", "assistant", "tool")
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"

_TURN = re.compile(r"\n\n(Human|Assistant):")
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}


def read_prompt(value: object, column: str) -> Prompt:
    """The messages of a prompt column, empty for None.

    Text is one user message, unless it starts with a transcript's first turn.
    """
    if value is None:
        return ()
    if not isinstance(value, str):
        return read_messages(value, column)
    if not value.startswith(HUMAN):
        return (Message("user", value),)
    turns = read_transcript(value, column)
    return turns[:-1] if turns[-1] == Message("assistant", "") else turns


def join(prompt: Prompt, sides: Iterable[tuple[str, object]]) -> tuple[Prompt, tuple[str, ...]]:
    """The one prompt of all sides (column name, value), and the response of each."""
    prompts, responses = [], []
    for column, value in sides:
        turns = _read_side(value, column)
        prompts.append(_before_response(prompt, turns[:-1], column))
        responses.append(turns[-1].content)
    if not prompts or not all(prompts):
        refuse("missing column", "no `prompt`, and no turn before the response")
    if any(other != prompts[0] for other in prompts):
        refuse("prompts differ", "the dialogues differ before their last assistant turn")
    return prompts[0], tuple(responses)


def split_texts(chosen: str, rejected: str) -> tuple[Prompt, object, object]:
    """Prompt and sides of two whole texts: two transcripts, or lines that both start with.

    Only whole lines count: answers that happen to share their first words share no prompt.
    """
    if ASSISTANT in chosen and ASSISTANT in rejected:
        # the first turn of some files lacks the two newlines that announce a turn
        turns = read_transcript("\n\n" + chosen.lstrip(), "chosen")
        return (), turns, read_transcript("\n\n" + rejected.lstrip(), "rejected")
    if chosen == rejected:
        refuse("chosen equals rejected", show(chosen))
    pairs = zip(chosen, rejected, strict=False)
    shared = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(chosen), len(rejected)))
    cut = chosen.rfind("\n", 0, shared) + 1
    if not chosen[:cut].strip():
        refuse("missing column", "no `prompt`; the texts are no transcripts and share no line")
    return (Message("user", chosen[:cut].strip()),), chosen[cut:], rejected[cut:]


def read_transcript(text: str, column: str) -> Prompt:
    """The turns of an Anthropic transcript, each stripped of the blanks around it."""
    before, *turns = _TURN.split(text)
    if before.strip():
        refuse("wrong roles", f"`{column}` has text before its first turn: {show(before)}")
    return tuple(
        Message(_SPEAKERS[speaker], content.strip())
        for speaker, content in zip(turns[::2], turns[1::2], strict=True)
    )


def read_messages(value: object, column: str) -> Prompt:
    """Messages from a list of {role, content}, or from a single one."""
    turns = [value] if isinstance(value, Mapping) else value
    if not isinstance(turns, list | tuple):
        refuse("not a string", f"`{column}` must be text or messages, got {show(value)}")
    return tuple(_read_message(turn, column) for turn in turns)


def check_prompt(prompt: Prompt, max_chars: int) -> None:
    """Refuse a prompt that is blank, too long, or in which speakers do not take turns.

    Two turns of one speaker in a row are an error in many chat templates: better one row refused
    here, and counted, than a run that stops there.
    """
    for message in prompt:
        check_text(message.content, "a message of the prompt", max_chars)
    size = sum(len(message.content) for message in prompt)
    if size > max_chars:
        refuse("too long", f"the prompt has {size:,} characters, the limit is {max_chars:,}")
    if not any(message.content.strip() for message in prompt):
        refuse("empty prompt", f"the prompt is {show([tuple(turn) for turn in prompt])}")
    for before, after in pairwise(message.role for message in prompt):
        if before == after and after in {"user", "assistant"}:
            refuse("wrong roles", f"two {after} turns follow one another; make them one message")
    if prompt[-1].role not in {"user", "tool"}:
        refuse("wrong roles", f"the prompt ends in role {prompt[-1].role!r}, not user or tool")


def _read_side(value: object, column: str) -> Prompt:
    """The turns of one side, the last of them a response that says something."""
    if not isinstance(value, str):
        turns = read_messages(value, column)
    elif value.startswith(HUMAN):
        turns = read_transcript(value, column)
    else:
        turns = (Message("assistant", value),)
    if not turns or turns[-1].role != "assistant":
        refuse("wrong roles", f"`{column}` must end in an assistant message, got {show(value)}")
    if not turns[-1].content.strip():
        refuse("empty response", f"`{column}` is {show(turns[-1].content)}")
    return turns


def _before_response(prompt: Prompt, said: Prompt, column: str) -> Prompt:
    """The whole conversation before the response, given the turns that this side has before it."""
    size = len(prompt)
    if not said:
        return prompt
    if said[:size] == prompt or said[-size:] == prompt:  # the prompt is repeated in the side
        return said
    if said[0].role != "assistant":
        refuse("prompts differ", f"`{column}` is a dialogue that does not hold the prompt")
    return prompt + said


def _read_message(turn: object, column: str) -> Message:
    if isinstance(turn, Message):
        turn = turn._asdict()
    if not isinstance(turn, Mapping):
        refuse("not a string", f"a message of `{column}` is {show(turn)}")
    role, content = turn.get("role"), turn.get("content")
    if not isinstance(role, str) or role not in ROLES:
        refuse("wrong roles", f"role {show(role)} in `{column}`; allowed: {', '.join(ROLES)}")
    if not isinstance(content, str) or turn.get("tool_calls"):
        refuse("not a string", f"a message of `{column}` is not plain text: {show(turn)}")
    return Message(role, content)
