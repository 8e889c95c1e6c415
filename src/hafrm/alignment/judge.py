"""Which of two replies is better: a model behind an endpoint asked in both orders, or a score for each.

A judge that is asked once says as much about the place of a reply as about the reply. So every pair is
asked about in both orders, and counts as a tie where the two answers disagree; how often they do because
the same place was preferred twice is reported. What was refused or cannot be read decides nothing, and is
counted.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, get_args, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from hafrm.alignment.endpoint import Endpoint, require_some
from hafrm.alignment.judge_prompts import (
    PAIRWISE,
    RANKING,
    Said,
    pairwise_question,
    ranking_question,
    read_ranking,
    read_verdict,
)
from hafrm.alignment.replies import Reply
from hafrm.alignment.scorers import Scorer
from hafrm.errors import ServerError
from hafrm.preferences import Group, Message, prompt_key

SETTINGS: Mapping[str, Any] = {"temperature": 0.0, "max_tokens": 512}
"""What a judge is asked with, unless its endpoint's options say otherwise."""


class Pair(NamedTuple):
    """Two replies to one prompt."""

    prompt: tuple[Message, ...]
    first: str
    second: str


@dataclass(frozen=True)
class Verdict:
    """Which reply of a pair is better."""

    preferred: int | None
    """1: the first, -1: the second, 0: neither; None: not judged."""
    said: tuple[Said, ...] = ()
    """What a judge that is asked said when the first reply stood first, and when it stood second; as the
    place that it preferred."""


@runtime_checkable
class PairJudge(Protocol):
    """Anything that compares replies."""

    name: str

    def decides(self) -> dict[str, Any]:
        """All that its verdicts depend on."""

    def compare(
        self, pairs: Sequence[Pair], done: Callable[[int, int], None] | None = None
    ) -> list[Verdict]:
        """A verdict on each pair, in order."""


class EndpointJudge:
    """A chat model behind an endpoint, asked about each pair in both orders."""

    def __init__(self, endpoint: Endpoint, template: str = PAIRWISE) -> None:
        """Asks the endpoint for its model's name where none was given, which may raise ServerError."""
        self.endpoint, self.template = endpoint, template
        self.name = endpoint.model

    def decides(self) -> dict[str, Any]:
        """All that its verdicts depend on."""
        options = self.endpoint.options
        return {
            "judge": options.url,
            "model": self.endpoint.model,
            "template": self.template,
            "settings": {**SETTINGS, **options.request},
        }

    def compare(
        self, pairs: Sequence[Pair], done: Callable[[int, int], None] | None = None
    ) -> list[Verdict]:
        """A verdict on each pair; of two equal replies neither is better, and nobody is asked.

        Raises ServerError when the endpoint cannot be used.
        """
        asked = [i for i, pair in enumerate(pairs) if pair.first != pair.second]
        questions = []
        for prompt, first, second in (pairs[i] for i in asked):
            questions.append(pairwise_question(self.template, prompt, first, second))
            questions.append(pairwise_question(self.template, prompt, second, first))
        replies = self.endpoint.ask(questions, SETTINGS, done=done)
        require_some(replies, self.endpoint.options.url)
        verdicts = [Verdict(0)] * len(pairs)
        for i, two in zip(asked, zip(replies[::2], replies[1::2], strict=True), strict=True):
            verdicts[i] = both_orders(*(_said(reply) for reply in two))
        return verdicts


def both_orders(forward: Said, backward: Said) -> Verdict:
    """The verdict of two answers, the second of them given with the replies in the other order.

    Both must name the same reply; any other two readable answers make a tie.
    """
    said = (forward, backward)
    if not set(said) <= {"first", "second", "tie"}:
        return Verdict(None, said)
    agreed = {("first", "second"): 1, ("second", "first"): -1}
    return Verdict(agreed.get(said, 0), said)


def _said(reply: Reply) -> Said:
    if reply.error is not None:
        return "refused"
    choice = reply.choices[0]
    return "refused" if choice.refused else read_verdict(choice.text)


class ScoreJudge:
    """Prefers the reply with the higher score: a gold reward, or a reward model."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
        self.name = scorer.name

    def decides(self) -> dict[str, Any]:
        """All that its verdicts depend on."""
        return {"judge": self.scorer.decides()}

    def compare(
        self, pairs: Sequence[Pair], done: Callable[[int, int], None] | None = None
    ) -> list[Verdict]:
        """A verdict on each pair; equal scores make a tie."""
        texts = [tuple(dict.fromkeys((pair.first, pair.second))) for pair in pairs]
        groups = [Group(f"pair {i}", pairs[i].prompt, both) for i, both in enumerate(texts)]
        return [
            Verdict(None if isinstance(scores, str) else int(np.sign(scores[0] - scores[-1])))
            for scores in self.scorer.score(groups, done)
        ]


class RankingJudge:
    """A chat model behind an endpoint, asked to rank all replies to a prompt, in two orders."""

    def __init__(self, endpoint: Endpoint, template: str = RANKING, seed: int = 0) -> None:
        self.endpoint, self.template, self.seed = endpoint, template, seed

    def decides(self) -> dict[str, Any]:
        """All that its rankings depend on."""
        options = self.endpoint.options
        return {
            "judge": options.url,
            "model": self.endpoint.model,
            "template": self.template,
            "settings": {**SETTINGS, **options.request},
            "seed": self.seed,
        }

    def rank(
        self, groups: Sequence[Group], done: Callable[[int, int], None] | None = None
    ) -> list[NDArray[np.float64] | None]:
        """For each group the mean rank of its responses over both orders, 0 the best; None where either
        answer is no ranking.

        The first order is drawn, the second is its reverse. Raises ServerError when the endpoint cannot
        be used.
        """
        orders = [
            np.random.default_rng([self.seed, int(prompt_key(group.prompt), 16)]).permutation(
                len(group.responses)
            )
            for group in groups
        ]
        both = [
            (g, o) for g, order in zip(groups, orders, strict=True) for o in (order, order[::-1])
        ]
        questions = [
            ranking_question(self.template, group.prompt, [group.responses[k] for k in order])
            for group, order in both
        ]
        replies = self.endpoint.ask(questions, SETTINGS, done=done)
        require_some(replies, self.endpoint.options.url)
        ranks = [_ranks(reply, order) for reply, (_, order) in zip(replies, both, strict=True)]
        return [
            None if one is None or other is None else (one + other) / 2
            for one, other in zip(ranks[::2], ranks[1::2], strict=True)
        ]


def _ranks(reply: Reply, order: NDArray[np.int64]) -> NDArray[np.float64] | None:
    """The rank of each response in the group's order, out of an answer about them in another order."""
    if reply.error is not None or reply.choices[0].refused:
        return None
    listed = read_ranking(reply.choices[0].text, len(order))
    if isinstance(listed, str):
        return None
    ranks = np.empty(len(order))
    ranks[order[listed]] = np.arange(len(order))
    return ranks


@dataclass(frozen=True)
class Conduct:
    """How a judge that is asked behaved; NaN where it said nothing that could show it."""

    num_pairs: int
    num_not_judged: int
    said: dict[str, int]
    """Answers by what they came to; "first" and "second" are the places."""
    position_bias: float
    """Share of judged pairs in which it preferred the same place twice."""
    first_place: float
    """Share of its preferences that went to the first place; without bias, a half."""


def conduct(verdicts: Sequence[Verdict]) -> Conduct:
    """What a judge's verdicts say about the judge; those that needed no asking are left out."""
    asked = [verdict for verdict in verdicts if verdict.said]
    judged = [verdict for verdict in asked if verdict.preferred is not None]
    said = Counter(each for verdict in asked for each in verdict.said)
    twice = sum(verdict.said in {("first",) * 2, ("second",) * 2} for verdict in judged)
    placed = said["first"] + said["second"]
    return Conduct(
        num_pairs=len(asked),
        num_not_judged=len(asked) - len(judged),
        said={name: said[name] for name in get_args(Said)},
        position_bias=twice / len(judged) if judged else float("nan"),
        first_place=said["first"] / placed if placed else float("nan"),
    )


def require_judged(verdicts: Sequence[Verdict], name: str) -> None:
    """Raises ServerError when a judge was asked and not one of its answers can be used."""
    asked = [verdict for verdict in verdicts if verdict.said]
    if asked and all(verdict.preferred is None for verdict in asked):
        said = Counter(each for verdict in asked for each in verdict.said)
        raise ServerError(
            f"the judge {name} decided none of {len(asked)} pairs ({dict(said)}); ask it in other words "
            '(--judge-template; the answer must end in a line "Verdict: A", "Verdict: B" or '
            '"Verdict: tie"), give it more tokens (--judge-request max_tokens=2048), or take another model'
        )
