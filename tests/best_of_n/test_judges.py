"""Judges: both orders, ties, conduct, and what is done about answers that are none."""

import json
import re

import numpy as np
import pytest

from endpoint_for_tests import fails, says, serving
from hafrm.best_of_n.candidate_scores import GoldScorer
from hafrm.best_of_n.endpoint import Endpoint, EndpointOptions
from hafrm.best_of_n.judges import (
    EndpointJudge,
    PairVerdict,
    RankingJudge,
    ReplyPair,
    ScoreJudge,
    combine_orders,
    judge_reliability,
    require_judged,
)
from hafrm.errors import DataError, ServerError
from hafrm.preferences import Group, Message

PROMPT = (Message("user", "Say it."),)


def pair(first: str, second: str) -> ReplyPair:
    return ReplyPair(PROMPT, first, second)


def replies_of(body) -> tuple[str, str]:
    text = body["messages"][-1]["content"]
    found = re.findall(r"\[Reply [AB]\]\n(.*?)\n\[End", text, re.DOTALL)
    return found[0], found[1]


def prefers_longer(body):
    a, b = replies_of(body)
    return says("Verdict: " + ("tie" if len(a) == len(b) else "A" if len(a) > len(b) else "B"))


@pytest.fixture
def connect(tmp_path):
    return lambda fake: Endpoint(EndpointOptions(fake.url, retries=0), tmp_path)


def test_every_pair_is_asked_about_in_both_orders_and_equal_replies_not_at_all(connect):
    with serving(prefers_longer) as fake:
        judge = EndpointJudge(connect(fake))
        pairs = [
            pair("long one", "one"),
            pair("x", "much longer"),
            pair("ab", "cd"),
            pair("s", "s"),
        ]
        found = judge.compare(pairs)
        assert [verdict.preferred for verdict in found] == [1, -1, 0, 0]
        assert {("long one", "one"), ("one", "long one")} < set(map(replies_of, fake.asked))
        assert len(fake.asked) == 6
        body = fake.asked[0]
        assert (body["temperature"], body["max_tokens"]) == (0.0, 512)
        assert judge.name == "m"


def test_a_judge_that_goes_by_place_makes_ties_and_is_found_out(connect):
    with serving(lambda _: says("Verdict: A")) as fake:
        found = EndpointJudge(connect(fake)).compare([pair("a", "b"), pair("c", "d")])
    assert [verdict.preferred for verdict in found] == [0, 0]
    seen = judge_reliability(found)
    assert (seen.position_bias, seen.first_place, seen.num_pairs) == (1.0, 1.0, 2)


@pytest.mark.parametrize(
    ("forward", "backward", "preferred"),
    [
        ("first", "second", 1),
        ("second", "first", -1),
        ("first", "first", 0),
        ("tie", "tie", 0),
        ("first", "tie", 0),
        ("first", "refused", None),
        ("unparsable", "second", None),
    ],
)
def test_two_answers_decide_only_where_they_agree(forward, backward, preferred):
    assert combine_orders(forward, backward).preferred == preferred


def test_conduct_counts_by_hand():
    """Judged pairs: 3; of these one has the same place twice: 1/3. Preferences: first place 3 (one in the
    pair that is not judged), second place 2: 3/5."""
    said = [("first", "second"), ("first", "tie"), ("second", "second"), ("first", "refused")]
    seen = judge_reliability([*(combine_orders(*answers) for answers in said), PairVerdict(0)])
    assert seen.num_pairs == 4
    assert seen.num_not_judged == 1
    assert seen.position_bias == pytest.approx(1 / 3)
    assert seen.first_place == pytest.approx(3 / 6)
    assert seen.answers == {"first": 3, "second": 3, "tie": 1, "refused": 1, "unparsable": 0}
    assert np.isnan(judge_reliability([PairVerdict(0)]).position_bias)


def test_refusals_rejections_and_nonsense_decide_nothing_and_are_counted(connect):
    def answer(body):
        a, b = replies_of(body)
        if "rejected" in (a, b):
            return fails(400, "too long")
        if "refused" in (a, b):
            return says("", refusal="no")
        if "sorry" in (a, b):
            return says("I'm sorry, I can't help with that.")
        return says("They are both replies.") if "vague" in (a, b) else prefers_longer(body)

    with serving(answer) as fake:
        names = ("rejected", "refused", "sorry", "vague", "x")
        found = EndpointJudge(connect(fake)).compare([pair(n, "plain reply") for n in names])
    assert [verdict.preferred for verdict in found] == [None, None, None, None, -1]
    seen = judge_reliability(found)
    assert seen.answers["refused"] == 6
    assert seen.answers["unparsable"] == 2
    require_judged(found, "m")
    with pytest.raises(ServerError, match=r"decided none of 4 pairs.*judge.template"):
        require_judged(found[:4], "m")


def test_a_template_of_ones_own_is_what_is_asked(connect):
    with serving(lambda _: says("B")) as fake:
        EndpointJudge(connect(fake), "{first}|{second}|{prompt}").compare([pair("a", "b")])
        asked = sorted(body["messages"][0]["content"] for body in fake.asked)
    assert asked == ["a|b|Say it.", "b|a|Say it."]


def test_scores_judge_by_sign_and_a_prompt_without_scores_is_not_judged():
    def gold(prompt, response):
        if prompt[-1].content == "Nobody knows.":
            raise DataError("no such prompt")
        return float(len(response))

    judge = ScoreJudge(GoldScorer("length", gold))
    strange = ReplyPair((Message("user", "Nobody knows."),), "a", "b")
    found = judge.compare(
        [pair("aa", "b"), pair("a", "bb"), pair("a", "b"), pair("s", "s"), strange]
    )
    assert [verdict.preferred for verdict in found] == [1, -1, 0, 0, None]
    assert json.dumps(judge.cache_key())


def ranks_by_length(body):
    text = body["messages"][-1]["content"]
    replies = re.findall(r"\[Reply \d+\]\n(.*?)\n\[End", text, re.DOTALL)
    order = sorted(range(len(replies)), key=lambda k: -len(replies[k]))
    return says("Ranking: " + " > ".join(str(k + 1) for k in order))


def test_a_ranking_is_the_mean_over_an_order_and_its_reverse(connect):
    group = Group("g", PROMPT, ("aa", "aaaa", "a", "aaa"))
    with serving(ranks_by_length) as fake:
        (found,) = RankingJudge(connect(fake)).rank([group])
        assert found.tolist() == [2, 0, 3, 1]
        orders = [
            re.findall(r"\[Reply \d+\]\n(a+)\n", b["messages"][-1]["content"]) for b in fake.asked
        ]
        assert orders[0] == orders[1][::-1]
    with serving(lambda _: says("Ranking: 1 > 2 > 3 > 4")) as fake:
        (by_place,) = RankingJudge(connect(fake)).rank([group])
    assert by_place.tolist() == [1.5] * 4
    with serving(lambda _: says("Hm.")) as fake:
        assert RankingJudge(connect(fake)).rank([group]) == [None]


def test_an_answer_cut_at_the_token_limit_decides_nothing(connect):
    """A reasoning judge that runs into max_tokens may be quoting the instructions."""
    with serving(
        lambda _: says("<think>End with Verdict: A or Verdict: B", finish="length")
    ) as fake:
        (verdict,) = EndpointJudge(connect(fake)).compare([pair("a", "b")])
    assert verdict == PairVerdict(None, ("unparsable", "unparsable"))
