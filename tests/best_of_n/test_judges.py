"""The judge: what it is asked and how its words are read, both orders, ties, reliability."""

import re
from math import isnan

import pytest

from hafrm.best_of_n.endpoint import Endpoint, EndpointSection, Reply
from hafrm.best_of_n.judges import (
    AnswerPair,
    Answers,
    LlmJudge,
    PairVerdict,
    ask_about,
    combine_orders,
    compare_answers,
    judge_reliability,
    read_verdict,
)
from hafrm.errors import ServerError
from hafrm.preferences import Message
from support.chat_endpoint import fails, says, serving
from support.length_judge import Longer


def pair(first: str, second: str) -> AnswerPair:
    return AnswerPair((Message("user", "Say it."),), first, second)


def answers_of(body) -> tuple[str, str]:
    text = body["messages"][-1]["content"]
    first, second = re.findall(r"\[Reply [AB]\]\n(.*?)\n\[End", text, re.DOTALL)
    return first, second


def prefers_longer(body):
    a, b = answers_of(body)
    return says("Verdict: " + ("tie" if len(a) == len(b) else "A" if len(a) > len(b) else "B"))


@pytest.fixture
def connect(tmp_path):
    return lambda fake: Endpoint(fake.url, EndpointSection(retries=0), cache=tmp_path)


def test_every_pair_is_asked_about_in_both_orders_and_equal_replies_not_at_all(connect):
    texts = [("long one", "one"), ("x", "much longer"), ("ab", "cd"), ("s", "s"), ("cd", "ab")]
    with serving(prefers_longer) as fake:
        judge = LlmJudge(connect(fake))
        verdicts = judge.compare([pair(*two) for two in texts])
        assert [verdict.preferred for verdict in verdicts] == [1, -1, 0, 0, 0]
        assert {("long one", "one"), ("one", "long one")} < set(map(answers_of, fake.asked))
        assert len(fake.asked) == 6
        body = fake.asked[0]
        assert (body["temperature"], body["max_tokens"]) == (0.0, 512)
        assert judge.name == "m"


@pytest.mark.parametrize(
    ("forward", "backward", "preferred"),
    [
        ("first", "second", 1),
        ("second", "first", -1),
        ("first", "first", 0),
        ("first", "tie", 0),
        ("first", "refused", None),
        ("unparsable", "second", None),
    ],
)
def test_two_answers_decide_only_where_they_agree(forward, backward, preferred):
    assert combine_orders(forward, backward).preferred == preferred


def test_reliability_by_hand():
    """Judged pairs: 3; of these one has the same place twice: 1/3."""
    said = [("first", "second"), ("first", "tie"), ("second", "second"), ("first", "refused")]
    seen = judge_reliability([*(combine_orders(*answers) for answers in said), PairVerdict(0)])
    assert (seen.num_pairs, seen.num_not_judged) == (4, 1)
    assert seen.position_bias == pytest.approx(1 / 3)
    assert seen.verdicts == {"first": 3, "second": 3, "tie": 1, "refused": 1, "unparsable": 0}
    assert isnan(judge_reliability([PairVerdict(0)]).position_bias)


def test_refusals_rejections_and_nonsense_decide_nothing_and_are_counted(connect):
    def answer(body):
        a, b = answers_of(body)
        if "rejected" in (a, b):
            return fails(400, "too long")
        if "refused" in (a, b):
            return says("", refusal="no")
        return says("They are both replies.") if "vague" in (a, b) else prefers_longer(body)

    with serving(answer) as fake:
        pairs = [pair(name, "plain reply") for name in ("rejected", "refused", "vague", "x")]
        verdicts = LlmJudge(connect(fake)).compare(pairs)
        with pytest.raises(ServerError, match="decided none of 3 pairs"):
            LlmJudge(connect(fake)).compare(pairs[:3])
    assert [verdict.preferred for verdict in verdicts] == [None, None, None, -1]
    seen = judge_reliability(verdicts)
    assert (seen.verdicts["refused"], seen.verdicts["unparsable"]) == (4, 2)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("It is right.\nVerdict: A", "first"),
        ("Verdict: A? No, it lies.\n**Verdict:** B", "second"),
        ("verdict: **tie**", "tie"),
        ("Verdict: a tie.", "tie"),
        ("Verdict: Reply B", "second"),
        ("Verdict: Response B", "second"),
        ("My verdict is: Assistant A", "first"),
        ("Verdict: A tie", "tie"),
        ("Verdict: draw", "tie"),
        ("Verdict: A=B", "unparsable"),
        ("I must end with\nVerdict: A\n</think>\nVerdict: B", "second"),
        ("My final verdict: [[B]]", "second"),
        ("Verdict:\n\nB", "second"),
        ("Verdict: A.\n\nNote: asked for Verdict: A, Verdict: B or Verdict: tie.", "first"),
        ("The verdict: a better reply would say more.", "unparsable"),
        ("Verdict: A and B are equally good", "unparsable"),
        ("Verdict: A or B: hard to say", "unparsable"),
        ("", "unparsable"),
        ("<think>I must end with\nVerdict: A", "unparsable"),
        ("<think>Verdict: A</think>\n\nI can't compare these.", "unparsable"),
        ("<think>Verdict: A?</think>Verdict: B", "second"),
    ],
)
def test_a_verdict_is_the_last_one_on_a_line_of_its_own(text, said):
    assert read_verdict(Reply(text)) == said
    # a reply cut at the token limit may be quoting the instructions
    assert read_verdict(Reply(text, ended=False)) == "unparsable"


def test_texts_are_put_in_as_they_are_braces_and_all():
    prompt = (Message("system", "Be brief."), Message("user", "Say {first}."))
    (message,) = ask_about(prompt, "{second} {x}", "plain")
    assert message.role == "user"
    assert "system: Be brief.\n\nuser: Say {first}." in message.content
    assert "[Reply A]\n{second} {x}\n[End of reply A]" in message.content
    assert "[Reply B]\nplain\n[End of reply B]" in message.content


def answers(texts: list[str], scores: list[float]) -> Answers:
    return Answers(((Message("user", "p"),), (Message("user", "q"),)), tuple(texts), tuple(scores))


def test_wins_are_counted_answer_by_answer_over_all_seeds():
    """a scores higher on 2 of 4, ties on 1, lower on 1. Lengths: 1 < 2, 2 = 2, 3 > 1, 1 < 2."""
    both = {
        "a": [answers(["x", "yy"], [1.0, 2.0]), answers(["xxx", "y"], [3.0, 0.0])],
        "b": [answers(["xx", "yy"], [0.0, 2.0]), answers(["x", "yy"], [1.0, 1.0])],
    }
    (wins,) = compare_answers(both, [("a", "b")], None, "gold")
    assert (wins.win.value, wins.tie.value, wins.lose.value) == (0.5, 0.25, 0.25)
    assert (wins.difference.value, wins.judge, wins.same) == (0.25, "gold", 0.25)
    (wins,) = compare_answers(both, [("a", "b")], Longer(), "gold")
    assert (wins.win.value, wins.tie.value, wins.lose.value) == (0.25, 0.25, 0.5)
    assert wins.judge == "longer"


def test_intervals_are_over_seeds_too():
    """One seed wins both, the other loses both: so two seeds say nothing of a third."""
    good, bad = answers(["x", "y"], [1.0, 1.0]), answers(["z", "z"], [0.0, 0.0])
    (wins,) = compare_answers({"a": [good, bad], "b": [bad, good]}, [("a", "b")], None)
    assert wins.difference.value == 0
    assert wins.difference.high > 1  # Student's t with one degree of freedom
    (single,) = compare_answers({"a": [good], "b": [bad]}, [("a", "b")], None)
    assert single.difference.value == 1
