"""The judge: what it is asked and how its words are read, both orders, ties, reliability."""

import re

import numpy as np
import pytest

from hafrm.best_of_n.endpoint import Endpoint, EndpointSection
from hafrm.best_of_n.judges import (
    TEMPLATE,
    AnswerPair,
    LlmJudge,
    PairVerdict,
    ask_about,
    combine_orders,
    judge_reliability,
    read_judge_template,
    read_verdict,
    require_judged,
)
from hafrm.errors import ConfigError, ServerError
from hafrm.preferences import Message
from support.chat_endpoint import fails, says, serving

PROMPT = (Message("user", "Say it."),)


def pair(first: str, second: str) -> AnswerPair:
    return AnswerPair(PROMPT, first, second)


def replies_of(body) -> tuple[str, str]:
    text = body["messages"][-1]["content"]
    verdicts = re.findall(r"\[Reply [AB]\]\n(.*?)\n\[End", text, re.DOTALL)
    return verdicts[0], verdicts[1]


def prefers_longer(body):
    a, b = replies_of(body)
    return says("Verdict: " + ("tie" if len(a) == len(b) else "A" if len(a) > len(b) else "B"))


@pytest.fixture
def connect(tmp_path):
    return lambda fake: Endpoint(fake.url, EndpointSection(retries=0), cache=tmp_path)


def test_every_pair_is_asked_about_in_both_orders_and_equal_replies_not_at_all(connect):
    with serving(prefers_longer) as fake:
        judge = LlmJudge(connect(fake))
        pairs = [
            pair("long one", "one"),
            pair("x", "much longer"),
            pair("ab", "cd"),
            pair("s", "s"),
        ]
        verdicts = judge.compare(pairs)
        assert [verdict.preferred for verdict in verdicts] == [1, -1, 0, 0]
        assert {("long one", "one"), ("one", "long one")} < set(map(replies_of, fake.asked))
        assert len(fake.asked) == 6
        body = fake.asked[0]
        assert (body["temperature"], body["max_tokens"]) == (0.0, 512)
        assert judge.name == "m"


def test_a_judge_that_goes_by_place_makes_ties_and_is_reported(connect):
    with serving(lambda _: says("Verdict: A")) as fake:
        verdicts = LlmJudge(connect(fake)).compare([pair("a", "b"), pair("c", "d")])
    assert [verdict.preferred for verdict in verdicts] == [0, 0]
    seen = judge_reliability(verdicts)
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


def test_reliability_by_hand():
    """Judged pairs: 3; of these one has the same place twice: 1/3. Preferences: first place 3 (one in the
    pair that is not judged), second place 2: 3/5."""
    said = [("first", "second"), ("first", "tie"), ("second", "second"), ("first", "refused")]
    seen = judge_reliability([*(combine_orders(*answers) for answers in said), PairVerdict(0)])
    assert seen.num_pairs == 4
    assert seen.num_not_judged == 1
    assert seen.position_bias == pytest.approx(1 / 3)
    assert seen.first_place == pytest.approx(3 / 6)
    assert seen.verdicts == {"first": 3, "second": 3, "tie": 1, "refused": 1, "unparsable": 0}
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
        verdicts = LlmJudge(connect(fake)).compare([pair(n, "plain reply") for n in names])
    assert [verdict.preferred for verdict in verdicts] == [None, None, None, None, -1]
    seen = judge_reliability(verdicts)
    assert seen.verdicts["refused"] == 6
    assert seen.verdicts["unparsable"] == 2
    require_judged(verdicts, "m")
    with pytest.raises(ServerError, match=r"decided none of 4 pairs.*judge.template"):
        require_judged(verdicts[:4], "m")


def test_a_custom_template_is_what_is_asked(connect, tmp_path):
    with serving(lambda _: says("B")) as fake:
        LlmJudge(connect(fake), "{first}|{second}|{prompt}").compare([pair("a", "b")])
        asked = sorted(body["messages"][0]["content"] for body in fake.asked)
    assert asked == ["a|b|Say it.", "b|a|Say it."]
    file = tmp_path / "t.txt"
    file.write_text("{prompt} {first}")
    with pytest.raises(ConfigError, match=r"lacks \{second\}"):
        read_judge_template(file)
    with pytest.raises(ConfigError, match="cannot read"):
        read_judge_template(tmp_path / "missing.txt")


def test_an_answer_cut_at_the_token_limit_decides_nothing(connect):
    """A reasoning judge that runs into max_tokens may be quoting the instructions."""
    with serving(
        lambda _: says("<think>End with Verdict: A or Verdict: B", finish="length")
    ) as fake:
        (verdict,) = LlmJudge(connect(fake)).compare([pair("a", "b")])
    assert verdict == PairVerdict(None, ("unparsable", "unparsable"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("It is right.\nVerdict: A", "first"),
        ("Verdict: A? No, it lies.\n**Verdict:** B", "second"),
        ("verdict: **tie**", "tie"),
        ("Verdict: a tie", "tie"),
        ("Verdict: Reply B", "second"),
        ("Both are fine.\nA.", "first"),
        ("[[B]]", "second"),
        ("The verdict: a better reply would say more.", "unparsable"),
        ("Reply A is nice, reply B is too.", "unparsable"),
        ("I'm sorry, but I can't compare these.", "refused"),
        ("", "refused"),
        ("\n ", "refused"),
        ("Both do.\nVerdict: A tie", "tie"),
        ("My final verdict is: [[B]]", "second"),
        ("Verdict: Response B", "second"),
        ("Verdict: Reply B is better than Reply A", "second"),
        ("Verdict: A and B are equally good", "tie"),
        ("Verdict: A=B", "tie"),
        ("Verdict: B>A", "second"),
        ("Verdict: A or B: hard to say", "unparsable"),
        ("Verdict:\n\nB", "second"),
        ("Verdict: $\\boxed{\\text{B}}$", "second"),
        ("Verdict: draw", "tie"),
        ("Verdict: A.\n\nNote: asked for Verdict: A, Verdict: B or Verdict: tie.", "first"),
        ("<think>I must end with Verdict: A, Verdict: B or Verdict: tie. Reply A", "unparsable"),
        ("<think>Verdict: A seems right</think>\n\nI can't compare these.", "refused"),
        ("<think>Verdict: A?</think>Verdict: B", "second"),
    ],
)
def test_a_verdict_is_the_last_one_named(text, said):
    assert read_verdict(text) == said


def test_texts_are_put_in_as_they_are_braces_and_all():
    prompt = (Message("system", "Be brief."), Message("user", "Say {first}."))
    (message,) = ask_about(TEMPLATE, prompt, "{second} {x}", "plain")
    assert message.role == "user"
    assert "system: Be brief.\n\nuser: Say {first}." in message.content
    assert "[Reply A]\n{second} {x}\n[End of reply A]" in message.content
    assert "[Reply B]\nplain\n[End of reply B]" in message.content
