"""Compare answers pairwise, by an LLM judge that is asked in both orders, or by scores; and who wins.

A judge that is asked once says as much about an answer's position as about the answer. So a pair is a tie
if the two orders disagree. Replies that cannot be read decide nothing, and are counted.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from hafrm.best_of_n.endpoint import Endpoint, EndpointSection, Reply, is_url, require_some
from hafrm.errors import ConfigError, ServerError
from hafrm.preferences import Message
from hafrm.progress import show_progress
from hafrm.results import Cell, Table, columns
from hafrm.statistics import (
    Estimate,
    Real,
    accuracy_interval,
    clustered_bootstrap,
    seeded_difference,
    seeded_mean,
)

SETTINGS: dict[str, Any] = {"temperature": 0.0, "max_tokens": 512}
"""How a judge is asked, unless `judge.request` says otherwise."""
Verdict = Literal["first", "second", "tie", "refused", "unparsable"]
"""What one reply of a judge says, as the position that it prefers."""
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
# A and B only as capitals ("a" is also a word), and on their own line: notes may quote verdicts
_VERDICT = re.compile(
    r"^\W*(?:(?i:the|my|final) )*(?i:verdict)(?i:\W+is\b)?\W*"
    r"((?i:(?:a )?(?:tie|draw))|(?:(?i:reply|response|assistant|answer) )?[AB])\W*$",
    re.M,
)
# a server may omit the opening tag, which the template writes; cut thoughts have no closing one
_THOUGHTS = re.compile(r"\A(?:(?!<think>).)*</think>|<think>.*?(?:</think>|\Z)", re.I | re.S)


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
    """An LLM judge's verdicts with the first answer in first position, and in second position."""


class LlmJudge:
    """A chat model behind an endpoint, asked about each pair in both orders."""

    def __init__(self, endpoint: Endpoint) -> None:
        """Asks the endpoint for its model's name if none is set, which may raise ServerError."""
        self.endpoint, self.name = endpoint, endpoint.model

    def compare(self, pairs: Sequence[AnswerPair]) -> list[PairVerdict]:
        """A verdict on each pair; equal answers are a tie without asking.

        Raises ServerError if the endpoint cannot be used, or if no verdict can be read.
        """
        orders = [(ask_about(p, a, b), ask_about(p, b, a)) for p, a, b in pairs]
        # two methods' picks may be the same pair as two others'
        questions = list(dict.fromkeys(q for both in orders if both[0] != both[1] for q in both))
        with show_progress(f"verdicts of {self.name}") as on_progress:
            replies = self.endpoint.ask(questions, SETTINGS, on_progress=on_progress)
        require_some(replies, self.endpoint.url)
        said = dict(zip(questions, map(read_verdict, replies), strict=True))
        verdicts = [
            combine_orders(said[forward], said[backward]) if forward != backward else PairVerdict(0)
            for forward, backward in orders
        ]
        seen = judge_reliability(verdicts)
        if seen.num_pairs and seen.num_not_judged == seen.num_pairs:
            raise ServerError(
                f"the judge {self.name} decided none of {seen.num_pairs} pairs ({seen.verdicts}); give it "
                "more tokens (judge.request='{max_tokens: 2048}'), or take another model"
            )
        return verdicts


def load_judge(url: str, section: EndpointSection | None = None) -> LlmJudge:
    """The judge at an endpoint; raises ConfigError for anything but a URL."""
    if not is_url(url):
        what = "a judge is given as the URL of an endpoint"
        raise ConfigError(f"{what}, got {url!r}; a reward model is a --gold")
    return LlmJudge(Endpoint(url, section, key_variable="HAFRM_JUDGE_KEY"))


def ask_about(prompt: Sequence[Message], first: str, second: str) -> tuple[Message, ...]:
    """The conversation that asks a judge about two answers in this order."""
    texts = {"prompt": conversation_text(prompt), "first": first, "second": second}
    # one pass: a brace in an answer is never read as a field
    filled = re.sub(r"\{(prompt|first|second)\}", lambda match: texts[match[1]], TEMPLATE)
    return (Message("user", filled),)


def conversation_text(prompt: Sequence[Message]) -> str:
    """A conversation as a judge reads it; a single user message without its role."""
    if len(prompt) == 1 and prompt[0].role == "user":
        return prompt[0].content
    return "\n\n".join(f"{message.role}: {message.content}" for message in prompt)


def read_verdict(reply: Reply) -> Verdict:
    """The last verdict of a reply; the thoughts of a reasoning model do not count."""
    if reply.error is not None or reply.refused:
        return "refused"
    verdicts = _VERDICT.findall(_THOUGHTS.sub("", reply.text))
    # cut at the token limit: what looks like a verdict may be a thought about the instructions
    if not verdicts or not reply.ended:
        return "unparsable"
    sides: Mapping[str, Verdict] = {"A": "first", "B": "second"}
    return sides.get(verdicts[-1][-1], "tie")


def combine_orders(forward: Verdict, backward: Verdict) -> PairVerdict:
    """The verdict from two replies, the second to the other order: a tie unless both prefer one answer."""
    by_order = (forward, backward)
    if not set(by_order) <= {"first", "second", "tie"}:
        return PairVerdict(None, by_order)
    agreed = {("first", "second"): 1, ("second", "first"): -1}
    return PairVerdict(agreed.get(by_order, 0), by_order)


@dataclass(frozen=True)
class JudgeReliability:
    """How an LLM judge behaved; NaN if no reply could show it."""

    num_pairs: int
    num_not_judged: int
    verdicts: dict[str, int]  # number of replies of each kind; "first" and "second" are positions
    position_bias: Real  # fraction of judged pairs in which it preferred the same position twice


def judge_reliability(verdicts: Sequence[PairVerdict]) -> JudgeReliability:
    """What a judge's verdicts say about the judge; pairs that it was not asked about are left out."""
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


@dataclass(frozen=True)
class Answers:
    """A method's answer to each prompt; every field has an entry for each prompt."""

    prompts: tuple[tuple[Message, ...], ...]
    texts: tuple[str, ...]
    scores: tuple[float, ...] = ()
    """Gold scores or rewards, to compare without a judge; empty if there are none."""


@dataclass(frozen=True)
class Wins:
    """The answers of two methods compared prompt by prompt; equal answers are ties."""

    first: str
    second: str
    judge: str
    win: Estimate
    tie: Estimate
    lose: Estimate
    difference: Estimate  # win - lose
    same: float  # fraction of prompts for which both gave the same answer
    num_not_judged: int  # left out of all fractions
    reliability: JudgeReliability | None  # of an LLM judge, over these pairs


def compare_answers(
    answers: Mapping[str, Sequence[Answers]],
    methods: Sequence[tuple[str, str]],
    judge: LlmJudge | None,
    scored_by: str = "",
) -> tuple[Wins, ...]:
    """Pairs of methods compared answer by answer, by the judge or else by the scores.

    A method has one entry for each seed; all have the same prompts.
    """
    pairs: list[list[AnswerPair]] = []
    verdicts: list[list[PairVerdict]] = []
    for first, second in methods:
        sides = list(zip(answers[first], answers[second], strict=True))
        texts = [zip(a.prompts, a.texts, b.texts, strict=True) for a, b in sides]
        pairs.append([AnswerPair(*pair) for seed in texts for pair in seed])
        gaps = [np.subtract(a.scores, b.scores) for a, b in sides]
        verdicts.append([PairVerdict(int(sign)) for sign in np.sign(np.concatenate(gaps))])
    if judge is not None:  # in one call, so that a repeated pair is asked about only once
        judged = iter(judge.compare([pair for own in pairs for pair in own]))
        verdicts = [[next(judged) for _ in own] for own in pairs]
    name = scored_by if judge is None else judge.name
    return tuple(
        _measure_wins(names, name, own, by_pair, num_seeds=len(answers[names[0]]))
        for names, own, by_pair in zip(methods, pairs, verdicts, strict=True)
    )


def _measure_wins(
    names: tuple[str, str],
    judge: str,
    pairs: Sequence[AnswerPair],
    verdicts: Sequence[PairVerdict],
    *,
    num_seeds: int,
) -> Wins:
    """The wins of two methods; `pairs` go seed by seed. A prompt not judged for one seed is left out for
    all of them."""
    preferred = [np.nan if v.preferred is None else v.preferred for v in verdicts]
    signs = np.array(preferred, np.float64).reshape(num_seeds, -1)
    judged = signs[:, ~np.isnan(signs).any(0)]
    several = num_seeds > 1 and judged.size > 0

    def fraction(sign: int) -> Estimate:
        hits = judged == sign
        return seeded_mean(hits) if several else accuracy_interval(hits.ravel())

    # wins - losses lie between -1 and 1, but seeded_mean would cut at 0: use a difference from nothing
    difference = clustered_bootstrap(judged.ravel())
    if several:
        difference = seeded_difference(judged, np.zeros_like(judged)).estimate
    reliability = judge_reliability(verdicts)
    return Wins(
        *names,
        judge=judge,
        win=fraction(1),
        tie=fraction(0),
        lose=fraction(-1),
        difference=difference,
        same=float(np.mean([pair.first == pair.second for pair in pairs])),
        num_not_judged=signs.size - judged.size,
        reliability=reliability if reliability.num_pairs else None,
    )


def wins_table(wins: Sequence[Wins], what: str = "picks") -> Table:
    """Who wins against whom; with the judge's reliability if an LLM was asked."""
    reports = [w.reliability for w in wins if w.reliability is not None]
    heads = "first | second | first wins | tie | second wins | wins - losses | same pick: percent"
    if reports:
        heads += " | position bias: percent | not judged: count"
    rows = []
    for w in wins:
        cells: tuple[Cell, ...] = (w.first, w.second, w.win, w.tie, w.lose, w.difference, w.same)
        bias = None if w.reliability is None else w.reliability.position_bias
        rows.append((*cells, bias, w.num_not_judged) if reports else cells)
    notes: tuple[str, ...] = ()
    if reports:
        totals = {name: sum(r.verdicts[name] for r in reports) for name in reports[0].verdicts}
        notes = ("the judge's answers: " + ", ".join(f"{k} {n}" for k, n in totals.items()),)
    title = f"{what} against each other, by {wins[0].judge} [95 %]"
    return Table(title, columns(heads), tuple(rows), notes)
