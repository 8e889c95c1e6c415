"""The judge: which of two answers to a prompt is better, by an LLM that is asked in both orders.

A judge that is asked once says as much about the place of an answer as about the answer. So every pair is
asked in both orders and is a tie where the two verdicts disagree; how often one place was preferred twice
is reported. Refusals, cut replies and replies that cannot be read decide nothing, and are counted.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from hafrm.best_of_n.endpoint import Endpoint, EndpointSection, Reply, is_url, require_some
from hafrm.errors import ConfigError, ServerError
from hafrm.preferences import Message
from hafrm.statistics import Real

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
# A and B as capitals only ("a" is also a word), and on a line of their own: notes may quote these
_VERDICT = re.compile(
    r"^\W*(?:(?i:the|my|final) )*(?i:verdict)\W*(?:(?i:reply) )?(A|B|(?i:(?:a )?tie))\W*$", re.M
)
_THOUGHTS = re.compile(r"<think>.*?(?:</think>|\Z)", re.I | re.S)


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

    def __init__(self, endpoint: Endpoint) -> None:
        """Asks the endpoint for its model's name where none is set, which may raise ServerError."""
        self.endpoint, self.name = endpoint, endpoint.model

    def compare(self, pairs: Sequence[AnswerPair]) -> list[PairVerdict]:
        """A verdict on each pair; equal answers are a tie without asking.

        Raises ServerError when the endpoint cannot be used, or nothing that it says.
        """
        differing = [i for i, pair in enumerate(pairs) if pair.first != pair.second]
        questions = []
        for prompt, first, second in (pairs[i] for i in differing):
            questions += [ask_about(prompt, first, second), ask_about(prompt, second, first)]
        replies = self.endpoint.ask(questions, SETTINGS)
        require_some(replies, self.endpoint.url)
        verdicts = [PairVerdict(0)] * len(pairs)
        for i, forward, backward in zip(differing, replies[::2], replies[1::2], strict=True):
            verdicts[i] = combine_orders(read_verdict(forward), read_verdict(backward))
        return verdicts


def load_judge(url: str, section: EndpointSection | None = None) -> LlmJudge:
    """The judge at an endpoint; raises ConfigError for anything but a URL."""
    if not is_url(url):
        raise ConfigError(
            f"a judge compares two answers and is given as the URL of an endpoint, got {url!r}; a reward "
            "model that scores answers is a --gold"
        )
    return LlmJudge(Endpoint(url, section, key_variable="HAFRM_JUDGE_KEY"))


def ask_about(prompt: Sequence[Message], first: str, second: str) -> tuple[Message, ...]:
    """The conversation that asks a judge about two answers in this order."""
    texts = {"prompt": conversation_text(prompt), "first": first, "second": second}
    # one pass: a brace in an answer is never taken for a name
    filled = re.sub(r"\{(prompt|first|second)\}", lambda match: texts[match[1]], TEMPLATE)
    return (Message("user", filled),)


def conversation_text(prompt: Sequence[Message]) -> str:
    """A conversation as a judge reads it; a single user message without its role."""
    if len(prompt) == 1 and prompt[0].role == "user":
        return prompt[0].content
    return "\n\n".join(f"{message.role}: {message.content}" for message in prompt)


def read_verdict(reply: Reply) -> Verdict:
    """The last verdict of a reply; what a reasoning model thinks does not count."""
    if reply.error is not None or reply.refused:
        return "refused"
    verdicts = _VERDICT.findall(_THOUGHTS.sub("", reply.text))
    # cut at the token limit: what looks like a verdict may be a thought about the instructions
    if not verdicts or not reply.ended:
        return "unparsable"
    sides: Mapping[str, Verdict] = {"A": "first", "B": "second"}
    return sides.get(verdicts[-1], "tie")


def combine_orders(forward: Verdict, backward: Verdict) -> PairVerdict:
    """The verdict of two replies, the second to the answers in the other order.

    Both must prefer the same answer; any other two readable verdicts make a tie.
    """
    by_order = (forward, backward)
    if not set(by_order) <= {"first", "second", "tie"}:
        return PairVerdict(None, by_order)
    agreed = {("first", "second"): 1, ("second", "first"): -1}
    return PairVerdict(agreed.get(by_order, 0), by_order)


@dataclass(frozen=True)
class JudgeReliability:
    """How an LLM judge behaved; NaN where no reply could show it."""

    num_pairs: int
    num_not_judged: int
    verdicts: dict[str, int]  # number of replies of each kind; "first" and "second" are the places
    position_bias: Real  # fraction of judged pairs in which it preferred the same place twice


def judge_reliability(verdicts: Sequence[PairVerdict]) -> JudgeReliability:
    """What a judge's verdicts say about the judge; pairs that needed no asking are left out."""
    asked = [verdict for verdict in verdicts if verdict.by_order]
    judged = [verdict for verdict in asked if verdict.preferred is not None]
    counts = Counter(place for verdict in asked for place in verdict.by_order)
    same_place = sum(v.by_order in {("first",) * 2, ("second",) * 2} for v in judged)
    return JudgeReliability(
        num_pairs=len(asked),
        num_not_judged=len(asked) - len(judged),
        verdicts={name: counts[name] for name in get_args(Verdict)},
        position_bias=same_place / len(judged) if judged else float("nan"),
    )


def require_judged(verdicts: Sequence[PairVerdict], name: str) -> None:
    """Raise ServerError when a judge was asked and none of its replies can be used."""
    seen = judge_reliability(verdicts)
    if seen.num_pairs and seen.num_not_judged == seen.num_pairs:
        raise ServerError(
            f"the judge {name} decided none of {seen.num_pairs} pairs ({seen.verdicts}); give it more "
            "tokens (judge.request='{max_tokens: 2048}'), or take another model: the reply must end in a "
            'line "Verdict: A", "Verdict: B" or "Verdict: tie"'
        )
