"""The judge: which of two answers to a prompt is better, by an LLM that is asked in both orders.

A judge that is asked once says as much about the place of an answer as about the answer. So every pair is
asked in both orders and is a tie where the two verdicts disagree; how often one place was preferred twice
is reported. Refusals, cut replies and replies that cannot be read decide nothing, and are counted.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from hafrm.best_of_n.endpoint import Endpoint, EndpointSection, Reply, is_url, require_some
from hafrm.errors import ConfigError, ServerError
from hafrm.preferences import Message
from hafrm.recipe import Location
from hafrm.results import Real

SETTINGS: Mapping[str, Any] = {"temperature": 0.0, "max_tokens": 512}
"""How a judge is asked, unless `judge.request` says otherwise."""
Verdict = Literal["first", "second", "tie", "refused", "unparsable"]
"""What one reply of a judge says, as the place that it prefers."""
TEMPLATE = """\
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

_REPLY = r"(?:(?i:reply|answer|response|assistant|option|boxed|text)\W*)*"
# a line that begins with a verdict outranks one that mentions it: notes may quote the instructions
_LINE = re.compile(r"^\W*(?:(?:the|my|final)\s+)*verdict\W*(?:is\W*)?(.*)", re.I | re.M)
_MENTION = re.compile(r"verdict\W*(?:is\W*)?(.*)", re.I)
_TIE = re.compile(
    rf"{_REPLY}(?:(?:(?i:an?)\s+)?(?i:tied?|draw|neither|both|equal(?:ly)?)\b"
    rf"|A\W*(?:=|/|and\b)\W*{_REPLY}B\b|B\W*(?:=|/|and\b)\W*{_REPLY}A\b|[AB]\W*tie\b)"
)
# A and B as capitals only ("a" is also a word), and only where no sentence follows
_SIDE = re.compile(
    rf"{_REPLY}([AB])(?![\w'])(?:\W*$|\W*[.,;:!?)\]*}}>]|\s+(?:is|wins|because|since|as)\b)"
)
_WORSE = re.compile(rf"{_REPLY}([AB])\W*<")
_ALONE = re.compile(rf"[^A-Za-z]*{_REPLY}(A|B|(?i:(?:an?\s+)?tie))[^A-Za-z]*")
_THOUGHTS = re.compile(r"<think>.*?(?:</think>|\Z)", re.I | re.S)
_REFUSAL = re.compile(
    r"^\W*(i'?m sorry|i am sorry|sorry|i apologi[sz]e|i can(?:no|')?t\b|i can ?not|i won'?t|i'?m unable|"
    r"i am unable|as an ai\b)",
    re.I,
)
_SIDES: Mapping[str, Verdict] = {"A": "first", "B": "second"}


class JudgeSection(EndpointSection):
    """How an LLM judge is asked."""

    template: Location | None = None
    """A file with {prompt}, {first} and {second} that asks for a last line `Verdict: A`, B or tie."""


class AnswerPair(NamedTuple):
    """Two answers to one prompt."""

    prompt: tuple[Message, ...]
    first: str
    second: str


@dataclass(frozen=True)
class PairVerdict:
    """Which answer of a pair is better."""

    preferred: int | None  # 1: the first, -1: the second, 0: neither; None: not judged
    by_order: tuple[Verdict, ...] = ()
    """An LLM judge's verdicts with the first answer in first place, and in second place."""


class LlmJudge:
    """A chat model behind an endpoint, asked about each pair in both orders."""

    def __init__(self, endpoint: Endpoint, template: str = TEMPLATE) -> None:
        """Asks the endpoint for its model's name where none is set, which may raise ServerError."""
        self.endpoint, self.template = endpoint, template
        self.name = endpoint.model

    def cache_key(self) -> dict[str, Any]:
        """Everything its verdicts depend on."""
        return {"judge": self.endpoint.cache_key(SETTINGS), "template": self.template}

    def compare(self, pairs: Sequence[AnswerPair]) -> list[PairVerdict]:
        """A verdict on each pair; equal answers are a tie without asking.

        Raises ServerError when the endpoint cannot be used.
        """
        differing = [i for i, pair in enumerate(pairs) if pair.first != pair.second]
        questions = []
        for prompt, first, second in (pairs[i] for i in differing):
            questions.append(ask_about(self.template, prompt, first, second))
            questions.append(ask_about(self.template, prompt, second, first))
        replies = self.endpoint.ask(questions, SETTINGS)
        require_some(replies, self.endpoint.url)
        verdicts = [PairVerdict(0)] * len(pairs)
        for i, forward, backward in zip(differing, replies[::2], replies[1::2], strict=True):
            verdicts[i] = combine_orders(_verdict_of(forward), _verdict_of(backward))
        return verdicts


def combine_orders(forward: Verdict, backward: Verdict) -> PairVerdict:
    """The verdict of two replies, the second to the answers in the other order.

    Both must prefer the same answer; any other two readable verdicts make a tie.
    """
    by_order = (forward, backward)
    if not set(by_order) <= {"first", "second", "tie"}:
        return PairVerdict(None, by_order)
    agreed = {("first", "second"): 1, ("second", "first"): -1}
    return PairVerdict(agreed.get(by_order, 0), by_order)


def _verdict_of(reply: Reply) -> Verdict:
    if reply.error is not None or reply.choices[0].refused:
        return "refused"
    choice = reply.choices[0]
    # cut at the token limit: what looks like a verdict may be a thought about the instructions
    return read_verdict(choice.text) if choice.ended else "unparsable"


def load_judge(url: str, section: JudgeSection | None = None) -> LlmJudge:
    """The judge at an endpoint; raises ConfigError for anything but a URL."""
    if not is_url(url):
        raise ConfigError(
            f"a judge compares two answers and is given as the URL of an endpoint, got {url!r}; a reward "
            "model that scores answers is a --gold"
        )
    section = section or JudgeSection()
    template = TEMPLATE if section.template is None else read_judge_template(section.template)
    return LlmJudge(Endpoint(url, section, key_variable="HAFRM_JUDGE_KEY"), template)


def read_judge_template(file: str | Path) -> str:
    """The text of a template file; raises ConfigError when it cannot be read or lacks a name."""
    names = ("{prompt}", "{first}", "{second}")
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read judge.template {file}: {error}") from error
    missing = [name for name in names if name not in text]
    if missing:
        raise ConfigError(
            f"judge.template {file} lacks {', '.join(missing)}; it must have {', '.join(names)}"
        )
    return text


def ask_about(
    template: str, prompt: Sequence[Message], first: str, second: str
) -> tuple[Message, ...]:
    """The conversation that asks a judge about two answers in this order."""
    texts = {"prompt": conversation_text(prompt), "first": first, "second": second}
    # one pass: a brace in an answer is never taken for a name
    filled = re.sub(r"\{(prompt|first|second)\}", lambda match: texts[match[1]], template)
    return (Message("user", filled),)


def conversation_text(prompt: Sequence[Message]) -> str:
    """A conversation as a judge reads it; a single user message without its role."""
    if len(prompt) == 1 and prompt[0].role == "user":
        return prompt[0].content
    return "\n\n".join(f"{message.role}: {message.content}" for message in prompt)


def read_verdict(text: str) -> Verdict:
    """What a reply says by its last verdict, or by its last line if that holds nothing else.

    The thoughts of a reasoning model do not count, whether they end or were cut.
    """
    reply = _THOUGHTS.sub("", text)
    verdicts = _LINE.findall(reply) or _MENTION.findall(reply)
    if verdicts:
        verdict = verdicts[-1].strip("*_`$\\{}()[]\"' ")
        if _TIE.match(verdict):
            return "tie"
        worse, side = _WORSE.match(verdict), _SIDE.match(verdict)
        if worse:
            return "second" if worse[1] == "A" else "first"
        return _SIDES[side[1]] if side else "unparsable"
    alone = _ALONE.fullmatch(reply.strip().rpartition("\n")[2])
    if alone:
        return _SIDES.get(alone[1], "tie")
    if reply.strip():
        return "refused" if _REFUSAL.match(reply) else "unparsable"
    # nothing but thoughts: cut at the token limit, not refused
    return "unparsable" if text.strip() else "refused"


@dataclass(frozen=True)
class JudgeReliability:
    """How an LLM judge behaved; NaN where no reply could show it."""

    num_pairs: int
    num_not_judged: int
    verdicts: dict[str, int]  # number of replies of each kind; "first" and "second" are the places
    position_bias: Real  # fraction of judged pairs in which it preferred the same place twice
    first_place: Real
    """Fraction of its preferences that went to the first place; without bias, a half."""


def judge_reliability(verdicts: Sequence[PairVerdict]) -> JudgeReliability:
    """What a judge's verdicts say about the judge; pairs that needed no asking are left out."""
    asked = [verdict for verdict in verdicts if verdict.by_order]
    judged = [verdict for verdict in asked if verdict.preferred is not None]
    counts = Counter(place for verdict in asked for place in verdict.by_order)
    same_place = sum(v.by_order in {("first",) * 2, ("second",) * 2} for v in judged)
    preferences = counts["first"] + counts["second"]
    return JudgeReliability(
        num_pairs=len(asked),
        num_not_judged=len(asked) - len(judged),
        verdicts={name: counts[name] for name in get_args(Verdict)},
        position_bias=same_place / len(judged) if judged else float("nan"),
        first_place=counts["first"] / preferences if preferences else float("nan"),
    )


def require_judged(verdicts: Sequence[PairVerdict], name: str) -> None:
    """Raise ServerError when a judge was asked and none of its replies can be used."""
    seen = judge_reliability(verdicts)
    if seen.num_pairs and seen.num_not_judged == seen.num_pairs:
        raise ServerError(
            f"the judge {name} decided none of {seen.num_pairs} pairs ({seen.verdicts}); give it more "
            "tokens (judge.request='{max_tokens: 2048}'), ask it in other words (judge.template=FILE; the "
            'reply must end in a line "Verdict: A", "Verdict: B" or "Verdict: tie"), or take another model'
        )
