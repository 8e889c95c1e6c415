"""What a judge is asked, and how its answer is read; plain text in, plain text out.

Both templates are ours. A file of your own needs the same names in braces, and must ask for the same last
line. Texts are put in as they are, in one pass: a brace in an answer is never taken for a name.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from hafrm.errors import ConfigError
from hafrm.preferences import Message

Said = Literal["first", "second", "tie", "refused", "unparsable"]
"""What one answer of a judge comes to."""

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

# A and B as capitals only: "a" is also a word.
_NAMED = r"(?i:(?:reply|answer)\W*)?(A|B|(?i:(?:an?\s+)?tie))"
_VERDICT = re.compile(rf"(?i:verdict\W*(?:is\W*)?){_NAMED}\b")
_ALONE = re.compile(rf"\W*{_NAMED}\W*")
_RANKING = re.compile(r"ranking\W*(\d+(?:\s*[>,]\s*\d+)*)", re.IGNORECASE)
_NUMBERS_ALONE = re.compile(r"\W*(\d+(?:\s*[>,]\s*\d+)+)\W*")
_REFUSAL = re.compile(
    r"^\W*(i'?m sorry|i am sorry|sorry|i apologi[sz]e|i can(?:no|')?t\b|i can ?not|i won'?t|i'?m unable|"
    r"i am unable|as an ai\b)",
    re.IGNORECASE,
)
_SAID: Mapping[str, Said] = {"A": "first", "B": "second"}


def read_judge_template(file: str | Path, names: Sequence[str]) -> str:
    """The text of a template file; raises ConfigError when it cannot be read or lacks a name."""
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the judge's template {file}: {error}") from error
    missing = [name for name in names if f"{{{name}}}" not in text]
    if missing:
        raise ConfigError(
            f"the judge's template {file} lacks {', '.join(f'{{{name}}}' for name in missing)}; it must "
            f"have {', '.join(f'{{{name}}}' for name in names)}"
        )
    return text


def pairwise_question(
    template: str, prompt: Sequence[Message], first: str, second: str
) -> tuple[Message, ...]:
    """The conversation that asks a judge about two replies in this order."""
    texts = {"prompt": written(prompt), "first": first, "second": second}
    return (Message("user", _filled(template, texts)),)


def ranking_question(
    template: str, prompt: Sequence[Message], replies: Sequence[str]
) -> tuple[Message, ...]:
    """The conversation that asks a judge to rank replies, numbered from 1 in this order."""
    listed = "\n\n".join(
        f"[Reply {number}]\n{reply}\n[End of reply {number}]"
        for number, reply in enumerate(replies, 1)
    )
    texts = {"prompt": written(prompt), "replies": listed, "count": str(len(replies))}
    return (Message("user", _filled(template, texts)),)


def read_verdict(text: str) -> Said:
    """Which reply an answer prefers: by its last verdict, or as a whole where it says nothing else."""
    found = _VERDICT.findall(text)
    if found:
        return _SAID.get(found[-1], "tie")
    last = text.strip().rpartition("\n")[2]
    alone = _ALONE.fullmatch(last)
    if alone:
        return _SAID.get(alone[1], "tie")
    return _no_answer(text)


def read_ranking(text: str, num: int) -> list[int] | Said:
    """The replies from best to worst, counted from 0; or why there is no such list."""
    found = _RANKING.findall(text)
    alone = _NUMBERS_ALONE.fullmatch(text.strip().rpartition("\n")[2])
    if not found and alone:
        found = [alone[1]]
    if found:
        order = [int(number) - 1 for number in re.findall(r"\d+", found[-1])]
        if sorted(order) == list(range(num)):
            return order
        return "unparsable"
    return _no_answer(text)


def _no_answer(text: str) -> Said:
    return "refused" if not text.strip() or _REFUSAL.match(text) else "unparsable"


def written(prompt: Sequence[Message]) -> str:
    """A conversation as a judge reads it; a single message of a user stands for itself."""
    if len(prompt) == 1 and prompt[0].role == "user":
        return prompt[0].content
    return "\n\n".join(f"{message.role}: {message.content}" for message in prompt)


def _filled(template: str, texts: Mapping[str, str]) -> str:
    names = "|".join(map(re.escape, texts))
    return re.sub(rf"\{{({names})\}}", lambda match: texts[match[1]], template)
