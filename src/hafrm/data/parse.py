"""One raw row of a preference file -> prompt, responses and comparisons, or the first rule that it breaks.

Values may be of any type and size: a check returns the value in its proper type or raises `RefusedError`.
Nothing is repaired; only the turns of a transcript are stripped of white space. Start at `parse_row`.
"""

import json
import re
from collections.abc import Mapping
from itertools import combinations, pairwise
from os.path import commonprefix
from typing import Literal

from hafrm.data.files import (
    RawRow,
    Refusal,
    RefusedError,
    as_number,
    cell_of,
    check_text,
    columns_of,
    list_of,
    refuse,
    show,
)
from hafrm.preferences import Comparison, Group, Message, Votes

SHAPES = (
    "prompt, chosen, rejected: text or messages",
    "chosen, rejected: whole dialogues, as messages or as \\n\\nHuman: ... \\n\\nAssistant: ... text",
    "prompt, responses, and ranks or ranking (low is good) or scores or ratings (high is good)",
    "prompt, and response or responses: unlabelled, to be scored but not trained on",
    "prompt: alone, for a model to respond to",
)
TAGS = ("split", "subset", "source", "label")  # columns that become a group's tags
COLUMNS = frozenset(
    {
        *("prompt", "system", "chosen", "rejected", "response", "responses"),
        *("ranks", "ranking", "scores", "ratings", "margin", "weight", "votes", "tie", "id"),
        *TAGS,
    }
)
"""Every column that some shape understands; others are ignored and reported."""
CONTEXT_COLUMNS = (
    *("tools", "functions", "documents", "context", "input", "instruction"),
    *("image", "images", "video", "videos", "audio", "audios"),
    *("history", "conversation", "conversations"),
)
"""Columns that belong to the prompt in other formats: rows whose prompt would lack them are refused."""
MAX_RANKED = 256  # most responses that one row may rank: k of them make k(k-1)/2 comparisons
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"

_TURN = re.compile(r"\n\n(Human|Assistant):")
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
_ROLES = ("system", "user", "assistant", "tool")
_MESSAGES = re.compile(r"\s*\[\s*\{\s*[\"'](role|content)[\"']\s*:")
# labels, in lower case and with one space for anything that is not a letter or digit
_TIE = re.compile(
    r"tie[sd]?|draw|equal|equally (good|bad)|same|no preference|neither|(tie |it s a tie )?both ?(good|bad)"
)
_NO_WIN = re.compile(
    r"\b(tie\w*|draw|equal\w*|both|neither|rejected|los[et]\w*|worse|unsure|unclear)\b"
)
_ORDERS = {"ranks": -1, "ranking": -1, "scores": 1, "ratings": 1}  # sign that makes high good

ImplicitPrompt = Literal["lines", "words"]
Messages = tuple[Message, ...]


def parse_row(
    row: object,
    *,
    need_comparisons: bool = True,
    need_responses: bool = True,
    read_labels: bool = True,
    implicit_prompt: ImplicitPrompt = "lines",
) -> Group | Refusal:
    """The group of one row, whose responses are in the row's order and may repeat; or why it is refused.

    A tie is `tie: true` or a label such as "tie" or "both_bad" beside chosen and rejected, or an equal rank
    or score. Optional are `system` (text, the turn before all others), `margin` (finite, in reward units),
    `weight` (finite, not negative) and, for a pair, `votes`. `need_comparisons=False` also accepts rows
    without labels, `need_responses=False` rows with only a prompt. `read_labels=False` ignores labels, so
    that none can be a fault. `implicit_prompt`: cut texts without a prompt after the lines, or the words,
    that both start with.
    """
    try:
        if not isinstance(row, Mapping):
            refuse("unreadable row", f"expected an object with named columns, got {show(row)}")
        prompt, responses = read_prompt(row.get("prompt"), "prompt"), tuple[str, ...]()
        try:
            prompt, responses = _read_texts(row, prompt, implicit_prompt)
        except RefusedError:
            if need_responses or row.get("prompt") is None:
                raise
        prompt = _with_context(row, prompt)
        comparisons = _compare(row, responses) if read_labels and responses else ()
        check_prompt(prompt)
        if need_comparisons and not comparisons:
            refuse("missing column", "nothing to compare: no two responses with a label")
        names = [name for name in ("id", *TAGS) if read_labels or name != "label"]
        tags = {name: _label(row[name], name) for name in names if row.get(name) is not None}
        return Group(tags.pop("id", ""), prompt, responses, comparisons, tags=tags)
    except RefusedError as refused:
        return refused.refusal


def _read_texts(
    row: RawRow, prompt: Messages, implicit_prompt: ImplicitPrompt
) -> tuple[Messages, tuple[str, ...]]:
    """The one prompt of all sides (column -> value), and each side's response.

    A side may be the bare response, the whole dialogue, or the turns that follow the prompt.
    """
    sides = _read_sides(row)
    if "chosen" in sides and row.get("prompt") is None:
        prompt, sides = _split_texts(sides, implicit_prompt)
    prompts, responses = [], []
    for column, value in sides.items():
        turns = read_messages(value, column, "assistant")
        if not turns or turns[-1].role != "assistant":
            refuse("wrong roles", f"`{column}` must end in an assistant message, got {show(value)}")
        responses.append(turns[-1].content)
        if not responses[-1].strip():
            refuse("empty response", f"`{column}` is {show(responses[-1])}")
        check_text(responses[-1], "a response")
        prompts.append(_before_response(prompt, turns[:-1], column))
    if not all(prompts):
        refuse("missing column", "no `prompt`, and no turn before the response")
    if any(other != prompts[0] for other in prompts):
        refuse("prompts differ", "the dialogues differ before their last assistant turn")
    return prompts[0], tuple(responses)


def _with_context(row: RawRow, prompt: Messages) -> Messages:
    """The prompt, after the system turn from the column `system`; other context is refused."""
    system = row.get("system")
    if not isinstance(system, str | None):
        refuse("not a string", f"`system` must be text, got {show(system)}")
    if system and system.strip() and prompt[:1] != (Message("system", system),):
        if prompt and prompt[0].role == "system":
            refuse("wrong roles", f"`system` is not the prompt's own system turn: {show(system)}")
        prompt = (Message("system", system), *prompt)
    for column in CONTEXT_COLUMNS:
        value = row.get(column)
        is_blank = value is None or (isinstance(value, str | list | tuple | Mapping) and not value)
        # beside messages, some files repeat the question as an instruction
        is_repeated = isinstance(value, str) and value in [message.content for message in prompt]
        if not is_blank and not is_repeated:
            refuse("unread context", f"`{column}` is not read, and holds {show(value)}")
    return prompt


def _read_sides(row: RawRow) -> Mapping[str, object]:
    """The columns that hold the row's responses, in order."""
    if row.get("chosen") is not None or row.get("rejected") is not None:
        return {side: cell_of(row, side) for side in ("chosen", "rejected")}
    if row.get("responses") is not None:
        responses = list_of(row["responses"], "responses")
        if not responses:
            refuse("missing column", "the list of responses is empty")
        return {f"response {index}": value for index, value in enumerate(responses)}
    if row.get("response") is None:
        refuse("missing column", f"no responses that could be compared; {columns_of(row)}")
    return {"response": row["response"]}


def _compare(row: RawRow, texts: tuple[str, ...]) -> tuple[Comparison, ...]:
    """The comparisons of a row's responses, by the columns that label them."""
    if row.get("chosen") is not None:
        if texts[0].strip() == texts[1].strip():
            refuse("chosen equals rejected", show(texts[0]))
        tie, label = row.get("tie"), row.get("label")
        if tie is not None and not isinstance(tie, bool):
            refuse("bad number", f"`tie` must be true or false, got {show(tie)}")
        words = re.sub(r"[\W_]+", " ", label.lower()).strip() if isinstance(label, str) else ""
        is_tie = _TIE.fullmatch(words) is not None
        if not is_tie and _NO_WIN.search(words):  # other labels say who won, or who judged
            refuse("unknown label", f"`label` is neither a tie nor a win of chosen: {show(label)}")
        tie = bool(tie) or is_tie
        return (Comparison(0, 1, *_margin_and_weight(row), tie, _votes(row.get("votes"))),)
    orders = [column for column in _ORDERS if row.get(column) is not None]
    if row.get("responses") is None or not orders:
        return ()
    if len(orders) > 1:
        refuse("bad number", f"both {orders[0]} and {orders[1]} are given; keep one of them")
    column, sign = orders[0], _ORDERS[orders[0]]
    values = list_of(row[column], column)
    if len(values) != len(texts):
        refuse("bad number", f"{len(texts)} responses, but {len(values)} {column}")
    return _compare_all(row, texts, [sign * as_number(value, column) for value in values])


def _compare_all(
    row: RawRow, texts: tuple[str, ...], goodness: list[float]
) -> tuple[Comparison, ...]:
    """Every pair of responses; equal values tie, and a text is not compared with itself."""
    if len(texts) > MAX_RANKED:
        refuse("too long", f"{len(texts)} labelled responses, at most {MAX_RANKED} are compared")
    if row.get("votes") is not None:
        refuse("bad number", "`votes` belong to one pair, not to a list of responses")
    margin, weight = _margin_and_weight(row)
    comparisons = []
    for i, j in combinations(range(len(texts)), 2):
        gap = goodness[i] - goodness[j]
        if texts[i].strip() == texts[j].strip():
            if gap:
                refuse("chosen equals rejected", f"one text, two ranks or scores: {show(texts[i])}")
        elif gap == 0:
            comparisons.append(Comparison(i, j, weight=weight, tie=True))
        else:
            best, worst = (i, j) if gap > 0 else (j, i)
            comparisons.append(Comparison(best, worst, margin=margin, weight=weight))
    return tuple(comparisons)


def _before_response(prompt: Messages, said: Messages, column: str) -> Messages:
    """The whole conversation before a side's response; `said` are the turns before it in that side."""
    size = len(prompt)
    if not said:
        return prompt
    if said[:size] == prompt or said[-size:] == prompt:  # the side repeats the prompt
        return said
    if said[0].role != "assistant":
        refuse("prompts differ", f"`{column}` is a dialogue that does not hold the prompt")
    return prompt + said


def _split_texts(
    sides: Mapping[str, object], implicit_prompt: ImplicitPrompt
) -> tuple[Messages, Mapping[str, object]]:
    """Prompt and sides of two whole texts: two transcripts, or texts that start with the same lines."""
    sides = {side: _decoded(value, side) for side, value in sides.items()}
    chosen, rejected = sides.values()
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        return (), sides
    if ASSISTANT in chosen and ASSISTANT in rejected:
        # the first turn of some files lacks the two line breaks that announce a turn
        texts = {side: "\n\n" + str(text).lstrip() for side, text in sides.items()}
        return (), {side: _read_transcript(text, side) for side, text in texts.items()}
    # by default only whole lines count: two answers that share their first words share no prompt
    ends = re.finditer(
        r"\s" if implicit_prompt == "words" else r"\n",
        commonprefix([chosen, rejected]),  # noqa: RUF071 - of text, not of paths
    )
    cut = max((end.end() for end in ends), default=0)
    if not chosen[:cut].strip():
        unit = implicit_prompt.removesuffix("s")
        hint = "; set data.implicit_prompt: words to cut at words" if unit == "line" else ""
        problem = f"the texts are not transcripts and share no {unit}"
        refuse("missing column", f"no `prompt`; {problem}{hint}")
    prompt = Message("user", chosen[:cut].strip())
    return (prompt,), {"chosen": chosen[cut:], "rejected": rejected[cut:]}


def read_prompt(value: object, column: str) -> Messages:
    """The messages of a prompt column, empty for None; text is read as by `read_messages`."""
    turns = () if value is None else read_messages(value, column)
    # a transcript's prompt ends in an empty turn that announces the answer
    announced = isinstance(value, str) and turns[-1:] == (Message("assistant", ""),)
    return turns[:-1] if announced else turns


def read_messages(value: object, column: str, role: str = "user") -> Messages:
    """Messages from a list of {role, content} or a single one; or from text.

    Text is one message of `role`, unless it holds messages as JSON or starts with the first turn of an
    Anthropic transcript. A system turn whose content is null is skipped.
    """
    value = _decoded(value, column)
    if isinstance(value, str):
        is_transcript = value.startswith(HUMAN)
        return _read_transcript(value, column) if is_transcript else (Message(role, value),)
    turns = [value] if isinstance(value, Mapping) else value
    if not isinstance(turns, list | tuple):
        refuse("not a string", f"`{column}` must be text or messages, got {show(value)}")
    messages = (_read_message(turn, column) for turn in turns)
    return tuple(message for message in messages if message is not None)


def _decoded(value: object, column: str) -> object:
    """The messages that a text holds as JSON; anything else as it is."""
    match = _MESSAGES.match(value) if isinstance(value, str) else None
    if match is None:
        return value
    try:
        turns = json.loads(match.string)
    except (ValueError, RecursionError) as error:
        if match[1] == "content":  # perhaps an answer in JSON about something else
            return value
        refuse("unreadable row", f"`{column}` looks like messages in JSON, {error}: {show(value)}")
    return turns if all(isinstance(turn, dict) and "role" in turn for turn in turns) else value


def _read_message(turn: object, column: str) -> Message | None:
    if isinstance(turn, Message):
        turn = turn._asdict()
    if not isinstance(turn, Mapping):
        refuse("not a string", f"a message of `{column}` is {show(turn)}")
    role, content = turn.get("role"), turn.get("content")
    if not isinstance(role, str) or role not in _ROLES:
        refuse("wrong roles", f"role {show(role)} in `{column}`; allowed: {', '.join(_ROLES)}")
    if role == "system" and content is None:
        return None
    if isinstance(content, list | tuple):  # parts, of which only text can be joined
        parts = [dict(part) if isinstance(part, Mapping) else {} for part in content]
        texts = [part.pop("text", None) for part in parts if part.pop("type", None) == "text"]
        if len(texts) == len(parts) and not any(v is not None for p in parts for v in p.values()):
            content = "".join(texts) if all(isinstance(text, str) for text in texts) else content
    if not isinstance(content, str) or turn.get("tool_calls"):
        refuse("not a string", f"a message of `{column}` is not plain text: {show(turn)}")
    return Message(role, content)


def _read_transcript(text: str, column: str) -> Messages:
    before, *turns = _TURN.split(text)
    if before.strip():
        refuse("wrong roles", f"`{column}` has text before its first turn: {show(before)}")
    pairs = zip(turns[::2], turns[1::2], strict=True)
    return tuple(Message(_SPEAKERS[speaker], content.strip()) for speaker, content in pairs)


def check_prompt(prompt: Messages) -> None:
    """Refuse a prompt that is blank, too long, or in which the speakers do not take turns."""
    check_text("".join(message.content for message in prompt), "the prompt")
    if not any(message.content.strip() for message in prompt):
        refuse("empty prompt", f"the prompt is {show([tuple(turn) for turn in prompt])}")
    # many chat templates raise on two turns of one speaker: one bad row is better than a run that stops
    for before, after in pairwise(message.role for message in prompt):
        if before == after and after in {"user", "assistant"}:
            refuse("wrong roles", f"two {after} turns follow one another; make them one message")
    if prompt[-1].role not in {"user", "tool"}:
        refuse("wrong roles", f"the prompt ends in role {prompt[-1].role!r}, not user or tool")


def _margin_and_weight(row: RawRow) -> tuple[float, float]:
    margin, weight = (
        default if row.get(name) is None else as_number(row[name], name, "non-finite margin")
        for name, default in (("margin", 0.0), ("weight", 1.0))
    )
    if weight < 0:
        refuse("non-finite margin", f"`weight` must not be negative, got {weight:g}")
    return margin, weight


def _votes(value: object) -> Votes | None:
    """Votes from {chosen, rejected, tie} or [chosen, rejected(, tie)]; None when a row has none."""
    if value is None:
        return None
    if isinstance(value, list | tuple) and len(value) <= 3:
        value = dict(zip(Votes._fields, value, strict=False))
    if not isinstance(value, Mapping) or value.keys() | {"tie"} != set(Votes._fields):
        refuse("bad number", f"`votes` must count chosen, rejected and tie, got {show(value)}")
    # a column that only some rows fill comes back from Parquet as null in the others
    numbers = {k: 0.0 if n is None else as_number(n, "votes") for k, n in value.items()}
    if any(number < 0 or number % 1 for number in numbers.values()):
        refuse("bad number", f"`votes` must be whole and not negative, got {show(value)}")
    return Votes(**{name: int(number) for name, number in numbers.items()})


def _label(value: object, column: str) -> str:
    if not isinstance(value, str | int | float):
        refuse("not a string", f"`{column}` must be text or a number, got {show(value)}")
    check_text(str(value), f"`{column}`")
    return str(value)
