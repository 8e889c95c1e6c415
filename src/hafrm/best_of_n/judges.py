"""Judges: which of two replies is better, by an LLM asked in both orders, or by a score for each.

A judge asked once says as much about the place of a reply as about the reply. So every pair is asked about
in both orders, and is a tie where the two answers disagree; how often the same place was preferred twice is
reported. Refusals, cut answers and answers that cannot be read decide nothing, and are counted.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, get_args, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from hafrm.best_of_n.candidate_scores import CandidateScorer
from hafrm.best_of_n.endpoint import Endpoint, Reply, require_some
from hafrm.best_of_n.judge_prompts import (
    PAIRWISE,
    RANKING,
    Answer,
    pairwise_question,
    ranking_question,
    read_ranking,
    read_verdict,
)
from hafrm.errors import ServerError
from hafrm.preferences import Group, Message, prompt_key
from hafrm.results import Real
from hafrm.statistics import (
    Estimate,
    accuracy_interval,
    clustered_bootstrap,
    seeded_difference,
    seeded_mean,
)
from hafrm.table import Cell, Column, Table

SETTINGS: Mapping[str, Any] = {"temperature": 0.0, "max_tokens": 512}
"""How a judge is asked, unless its endpoint's options say otherwise."""


class ReplyPair(NamedTuple):
    """Two replies to one prompt."""

    prompt: tuple[Message, ...]
    first: str
    second: str


@dataclass(frozen=True)
class PairVerdict:
    """Which reply of a pair is better."""

    preferred: int | None
    """1: the first, -1: the second, 0: neither; None: not judged."""
    answers: tuple[Answer, ...] = ()
    """An LLM judge's answers with the first reply in first place, and in second place; as the place
    that it preferred."""


@runtime_checkable
class PairJudge(Protocol):
    """Anything that compares two replies."""

    name: str

    def cache_key(self) -> dict[str, Any]:
        """Everything its verdicts depend on."""

    def compare(self, pairs: Sequence[ReplyPair]) -> list[PairVerdict]:
        """A verdict on each pair, in order."""


class EndpointJudge:
    """A chat model behind an endpoint, asked about each pair in both orders."""

    def __init__(self, endpoint: Endpoint, template: str = PAIRWISE) -> None:
        """Asks the endpoint for its model's name where none was given, which may raise ServerError."""
        self.endpoint, self.template = endpoint, template
        self.name = endpoint.model

    def cache_key(self) -> dict[str, Any]:
        """Everything its verdicts depend on."""
        return {**_endpoint_key(self.endpoint), "template": self.template}

    def compare(self, pairs: Sequence[ReplyPair]) -> list[PairVerdict]:
        """A verdict on each pair; equal replies are a tie without asking.

        Raises ServerError when the endpoint cannot be used.
        """
        differing = [i for i, pair in enumerate(pairs) if pair.first != pair.second]
        questions = []
        for prompt, first, second in (pairs[i] for i in differing):
            questions.append(pairwise_question(self.template, prompt, first, second))
            questions.append(pairwise_question(self.template, prompt, second, first))
        replies = self.endpoint.ask(questions, SETTINGS)
        require_some(replies, self.endpoint.options.url)
        verdicts = [PairVerdict(0)] * len(pairs)
        for i, forward, backward in zip(differing, replies[::2], replies[1::2], strict=True):
            verdicts[i] = combine_orders(_answer(forward), _answer(backward))
        return verdicts


def combine_orders(forward: Answer, backward: Answer) -> PairVerdict:
    """The verdict of two answers, the second given with the replies in the other order.

    Both must name the same reply; any other two readable answers make a tie.
    """
    answers = (forward, backward)
    if not set(answers) <= {"first", "second", "tie"}:
        return PairVerdict(None, answers)
    agreed = {("first", "second"): 1, ("second", "first"): -1}
    return PairVerdict(agreed.get(answers, 0), answers)


def _answer(reply: Reply) -> Answer:
    if reply.error is not None or reply.choices[0].refused:
        return "refused"
    choice = reply.choices[0]
    # cut at the token limit: what looks like a verdict may be a thought about the instructions
    return read_verdict(choice.text) if choice.ended else "unparsable"


class ScoreJudge:
    """Prefers the reply with the higher score: a gold reward, or a reward model."""

    def __init__(self, scorer: CandidateScorer) -> None:
        self.scorer = scorer
        self.name = scorer.name

    def cache_key(self) -> dict[str, Any]:
        """Everything its verdicts depend on."""
        return {"judge": self.scorer.cache_key()}

    def compare(self, pairs: Sequence[ReplyPair]) -> list[PairVerdict]:
        """A verdict on each pair; equal scores are a tie."""
        texts = [tuple(dict.fromkeys((pair.first, pair.second))) for pair in pairs]
        groups = [Group(f"pair {i}", pairs[i].prompt, both) for i, both in enumerate(texts)]
        return [
            PairVerdict(None if isinstance(scores, str) else int(np.sign(scores[0] - scores[-1])))
            for scores in self.scorer.score(groups)
        ]


class RankingJudge:
    """A chat model behind an endpoint, asked to rank all replies to a prompt, in two orders."""

    def __init__(self, endpoint: Endpoint, seed: int = 0) -> None:
        self.endpoint, self.seed = endpoint, seed

    def cache_key(self) -> dict[str, Any]:
        """Everything its rankings depend on."""
        return {**_endpoint_key(self.endpoint), "template": RANKING, "seed": self.seed}

    def rank(self, groups: Sequence[Group]) -> list[NDArray[np.float64] | None]:
        """For each group the mean rank of its responses over both orders, 0 the best; None where either
        answer is not a ranking.

        The first order is random, the second its reverse. Raises ServerError when the endpoint cannot be
        used.
        """
        both = []
        for group in groups:
            draw = np.random.default_rng([self.seed, int(prompt_key(group.prompt), 16)])
            order = draw.permutation(len(group.responses))
            both += [(group, order), (group, order[::-1])]
        questions = [
            ranking_question(group.prompt, [group.responses[k] for k in order])
            for group, order in both
        ]
        replies = self.endpoint.ask(questions, SETTINGS)
        require_some(replies, self.endpoint.options.url)
        ranks = [_ranks(reply, order) for reply, (_, order) in zip(replies, both, strict=True)]
        return [
            None if one is None or other is None else (one + other) / 2
            for one, other in zip(ranks[::2], ranks[1::2], strict=True)
        ]


def _endpoint_key(endpoint: Endpoint) -> dict[str, Any]:
    options = endpoint.options
    return {
        "judge": options.url,
        "model": endpoint.model,
        "settings": {**SETTINGS, **options.request},
    }


def _ranks(reply: Reply, order: NDArray[np.int64]) -> NDArray[np.float64] | None:
    """The rank of each response in the group's order, from an answer about them in another order."""
    if reply.error is not None or reply.choices[0].refused or not reply.choices[0].ended:
        return None
    ranking = read_ranking(reply.choices[0].text, len(order))
    if isinstance(ranking, str):
        return None
    ranks = np.empty(len(order))
    ranks[order[ranking]] = np.arange(len(order))
    return ranks


@dataclass(frozen=True)
class JudgeReliability:
    """How an LLM judge behaved; NaN where no answer could show it."""

    num_pairs: int
    num_not_judged: int
    answers: dict[str, int]
    """Number of answers of each kind; "first" and "second" are the places."""
    position_bias: Real
    """Fraction of judged pairs in which it preferred the same place twice."""
    first_place: Real
    """Fraction of its preferences that went to the first place; without bias, a half."""


def judge_reliability(verdicts: Sequence[PairVerdict]) -> JudgeReliability:
    """What a judge's verdicts say about the judge; pairs that needed no asking are left out."""
    asked = [verdict for verdict in verdicts if verdict.answers]
    judged = [verdict for verdict in asked if verdict.preferred is not None]
    counts = Counter(answer for verdict in asked for answer in verdict.answers)
    same_place = sum(v.answers in {("first",) * 2, ("second",) * 2} for v in judged)
    preferences = counts["first"] + counts["second"]
    return JudgeReliability(
        num_pairs=len(asked),
        num_not_judged=len(asked) - len(judged),
        answers={name: counts[name] for name in get_args(Answer)},
        position_bias=same_place / len(judged) if judged else float("nan"),
        first_place=counts["first"] / preferences if preferences else float("nan"),
    )


def require_judged(verdicts: Sequence[PairVerdict], name: str) -> None:
    """Raises ServerError when a judge was asked and not one of its answers can be used."""
    asked = [verdict for verdict in verdicts if verdict.answers]
    if asked and all(verdict.preferred is None for verdict in asked):
        counts = Counter(answer for verdict in asked for answer in verdict.answers)
        raise ServerError(
            f"the judge {name} decided none of {len(asked)} pairs ({dict(counts)}); give it more tokens "
            "(--set judge.request='{max_tokens: 2048}'), ask it in other words (--set judge.template=FILE; "
            'the answer must end in a line "Verdict: A", "Verdict: B" or "Verdict: tie"), or take '
            "another model"
        )


@dataclass(frozen=True)
class Wins:
    """The picks of two methods against each other, prompt by prompt; equal picks are ties."""

    first: str
    second: str
    judge: str
    win: Estimate
    tie: Estimate
    lose: Estimate
    difference: Estimate
    """win - lose."""
    same: float
    """Fraction of prompts for which both picked the same candidate."""
    num_not_judged: int
    """Left out of all fractions."""
    reliability: JudgeReliability | None
    """Of an LLM judge, over these pairs."""


def wins_table(wins: Sequence[Wins], what: str = "picks") -> Table:
    """Who wins against whom; with the judge's reliability where an LLM was asked."""
    asked = any(w.reliability for w in wins)
    columns = [
        Column("first"),
        Column("second"),
        Column("first wins"),
        Column("tie"),
        Column("second wins"),
        Column("wins - losses"),
        Column("same pick", "percent"),
    ]
    columns += [Column("position bias", "percent"), Column("not judged", "count")] * asked
    rows = []
    for w in wins:
        cells: tuple[Cell, ...] = (w.first, w.second, w.win, w.tie, w.lose, w.difference, w.same)
        bias = None if w.reliability is None else w.reliability.position_bias
        rows.append((*cells, bias, w.num_not_judged) if asked else cells)
    notes: tuple[str, ...] = ()
    reports = [w.reliability for w in wins if w.reliability is not None]
    if reports:
        totals = {name: sum(r.answers[name] for r in reports) for name in reports[0].answers}
        notes = ("the judge's answers: " + ", ".join(f"{k} {n}" for k, n in totals.items()),)
    title = f"{what} against each other, by {wins[0].judge} [95 %]"
    return Table(title, tuple(columns), tuple(rows), notes)


def measure_wins(
    first: str,
    second: str,
    judge: str,
    same: NDArray[np.bool_],
    verdicts: Sequence[PairVerdict],
    *,
    num_seeds: int = 1,
) -> Wins:
    """Fractions of wins, ties and losses of the first method; `same` is where both picked one candidate.

    With several seeds their verdicts stand one after the other, on the same prompts, and the intervals are
    over prompts and seeds; a prompt that is not judged for one seed is then left out for all.
    """
    preferred = [np.nan if v.preferred is None else v.preferred for v in verdicts]
    signs = np.array(preferred, np.float64).reshape(num_seeds, -1)
    judged = signs[:, ~np.isnan(signs).any(0)]
    several = num_seeds > 1 and judged.size > 0

    def fraction(sign: int) -> Estimate:
        hits = judged == sign
        return seeded_mean(hits) if several else accuracy_interval(hits.ravel())

    # wins - losses lie between -1 and 1, where seeded_mean would cut at 0: so a difference to nothing
    difference = (
        seeded_difference(judged, np.zeros_like(judged)).estimate
        if several
        else clustered_bootstrap(judged.ravel())
    )
    reliability = judge_reliability(verdicts)
    return Wins(
        first=first,
        second=second,
        judge=judge,
        win=fraction(1),
        tie=fraction(0),
        lose=fraction(-1),
        difference=difference,
        same=float(np.mean(same)),
        num_not_judged=signs.size - judged.size,
        reliability=reliability if reliability.num_pairs else None,
    )
