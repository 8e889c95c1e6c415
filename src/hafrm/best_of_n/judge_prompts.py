"""What an LLM judge is asked, and how its answer is read; plain text in, plain text out.

Both templates are ours. A file of your own needs the same names in braces, and must ask for the same last
line. Texts are put in as they are, in one pass: a brace in an answer is never taken for a name.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from hafrm.errors import ConfigError
from hafrm.preferences import Message

Answer = Literal["first", "second", "tie", "refused", "unparsable"]
"""What one answer of a judge says."""

PAIRWISE = """\
Two assistants were given the same conversation. Compare their replies to its last message.

Prefer the reply that does what was asked: correct, complete, honest, and safe. Do not prefer a reply for \
being longer, or for standing first.

[The conversation]
{prompt}
[End of the conversation]

[Reply A]
{first}
[End of reply A]

[Reply B]
{second}
[End of reply B]

Explain your judgement in a sentence or two. Then end with one line that says nothing but one of these:
Verdict: A
Verdict: B
Verdict: tie
"""
RANKING = """\
{count} assistants were given the same conversation. Rank their replies to its last message.

Prefer replies that do what was asked: correct, complete, honest, and safe. Do not prefer a reply for \
being longer, or for standing first.

[The conversation]
{prompt}
[End of the conversation]

{replies}

Explain your judgement in a sentence or two. Then end with one line that names every reply by its number, \
the best one first, as in this example for three replies:
Ranking: 2 > 3 > 1
"""

_REPLY = r"(?:(?i:reply|answer|response|assistant|option|boxed|text)\W*)*"
# a line that begins with a verdict outranks one that mentions it: notes may quote the instructions
_LINE = re.compile(r"^\W*(?:(?:the|my|final)\s+)*verdict\W*(?:is\W*)?(.*)", re.I | re.M)
_MENTION = re.compile(r"verdict\W*(?:is\W*)?(.*)", re.I)
_TIE = re.compile(
    rf"{_REPLY}(?:(?:(?i:an?)\s+)?(?i:tied?|draw|neither|both|equal(?:ly)?)\b"
    rf"|A\W*(?:=|/|and\b)\W*{_REPLY}B\b|B\W*(?:=|/|and\b)\W*{_REPLY}A\b)"
)
# A and B as capitals only ("a" is also a word), and not when a sentence goes on about it
_SIDE = re.compile(
    rf"{_REPLY}([AB])(?![\w'])(?:\W*$|\W*[.,;:!?)\]*}}>]|\s+(?:is|wins|because|since|as)\b)"
)
_WORSE = re.compile(rf"{_REPLY}([AB])\W*<")
_ALONE = re.compile(rf"[^A-Za-z]*{_REPLY}(A|B|(?i:(?:an?\s+)?tie))[^A-Za-z]*")
_RANKING = re.compile(r"ranking\W*(.*)", re.I)
_NUMBERS = re.compile(r"\d+(?:\s*[>,]\s*\d+)+")
_THOUGHTS = re.compile(r"<think>.*?(?:</think>|\Z)", re.I | re.S)
_REFUSAL = re.compile(
    r"^\W*(i'?m sorry|i am sorry|sorry|i apologi[sz]e|i can(?:no|')?t\b|i can ?not|i won'?t|i'?m unable|"
    r"i am unable|as an ai\b)",
    re.I,
)
_SIDES: Mapping[str, Answer] = {"A": "first", "B": "second"}


def read_judge_template(file: str | Path) -> str:
    """The text of a template file; raises ConfigError when it cannot be read or lacks a name."""
    names = ("{prompt}", "{first}", "{second}")
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the judge's template {file}: {error}") from error
    missing = [name for name in names if name not in text]
    if missing:
        raise ConfigError(
            f"the judge's template {file} lacks {', '.join(missing)}; it must have {', '.join(names)}"
        )
    return text


def pairwise_question(
    template: str, prompt: Sequence[Message], first: str, second: str
) -> tuple[Message, ...]:
    """The conversation that asks a judge about two replies in this order."""
    texts = {"prompt": conversation_text(prompt), "first": first, "second": second}
    return (Message("user", _fill(template, texts)),)


def ranking_question(prompt: Sequence[Message], replies: Sequence[str]) -> tuple[Message, ...]:
    """The conversation that asks a judge to rank replies, numbered from 1 in this order."""
    numbered = "\n\n".join(
        f"[Reply {number}]\n{reply}\n[End of reply {number}]"
        for number, reply in enumerate(replies, 1)
    )
    texts = {
        "prompt": conversation_text(prompt),
        "replies": numbered,
        "count": str(len(replies)),
    }
    return (Message("user", _fill(RANKING, texts)),)


def read_verdict(text: str) -> Answer:
    """Which reply an answer prefers, by its last verdict, or by its last line if that says nothing else.

    The thoughts of a reasoning model do not count, whether they end or were cut.
    """
    answer = _THOUGHTS.sub("", text)
    verdicts = _LINE.findall(answer) or _MENTION.findall(answer)
    if verdicts:
        return _side(verdicts[-1].strip("*_`$\\{}()[]\"' "))
    alone = _ALONE.fullmatch(answer.strip().rpartition("\n")[2])
    if alone:
        return _SIDES.get(alone[1], "tie")
    return _no_answer(text, answer)


def _side(verdict: str) -> Answer:
    if _TIE.match(verdict) or re.match(r"[AB]\W*tie\b", verdict):
        return "tie"
    worse = _WORSE.match(verdict)
    if worse:
        return "second" if worse[1] == "A" else "first"
    side = _SIDE.match(verdict)
    return _SIDES[side[1]] if side else "unparsable"


def read_ranking(text: str, num: int) -> list[int] | Answer:
    """The replies from best to worst, counted from 0; or why there is no such list."""
    answer = _THOUGHTS.sub("", text)
    lines = _RANKING.findall(answer) or [answer.strip().rpartition("\n")[2]]
    numbers = re.sub(r"(?i)reply|answer|[\[\]*]", "", lines[-1]).strip(" .")
    if _NUMBERS.fullmatch(numbers):
        order = [int(number) - 1 for number in re.findall(r"\d+", numbers)]
        return order if sorted(order) == list(range(num)) else "unparsable"
    return _no_answer(text, answer)


def _no_answer(text: str, answer: str) -> Answer:
    if answer.strip():
        return "refused" if _REFUSAL.match(answer) else "unparsable"
    # nothing but thoughts: cut at the token limit, not refused
    return "unparsable" if text.strip() else "refused"


def conversation_text(prompt: Sequence[Message]) -> str:
    """A conversation as a judge reads it; a single user message without its role."""
    if len(prompt) == 1 and prompt[0].role == "user":
        return prompt[0].content
    return "\n\n".join(f"{message.role}: {message.content}" for message in prompt)


def _fill(template: str, texts: Mapping[str, str]) -> str:
    names = "|".join(map(re.escape, texts))
    return re.sub(rf"\{{({names})\}}", lambda match: texts[match[1]], template)
