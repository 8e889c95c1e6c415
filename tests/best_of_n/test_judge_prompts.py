"""What a judge is asked, and how its words are read."""

import pytest

from hafrm.best_of_n.judge_prompts import (
    PAIRWISE,
    pairwise_question,
    ranking_question,
    read_judge_template,
    read_ranking,
    read_verdict,
)
from hafrm.errors import ConfigError
from hafrm.preferences import Message

PROMPT = (Message("user", "Say {first}."),)


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


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Good.\nRanking: 2 > 3 > 1", [1, 2, 0]),
        ("Ranking: 1 > 2 > 3\nOn second thought\nRanking: 3, 2, 1", [2, 1, 0]),
        ("3 > 1 > 2", [2, 0, 1]),
        ("Ranking: 2 > 3", "unparsable"),
        ("Ranking: 2 > 2 > 1", "unparsable"),
        ("Ranking: 1 > 2 > 4", "unparsable"),
        ("I cannot rank them.", "refused"),
        ("Ranking: [2] > [1] > [3]", [1, 0, 2]),
        ("Ranking: Reply 2 > Reply 1 > Reply 3", [1, 0, 2]),
        ("Ranking: 2 > 1 = 3", "unparsable"),
    ],
)
def test_a_ranking_names_every_reply_once(text, found):
    assert read_ranking(text, 3) == found


def test_texts_are_put_in_as_they_are_braces_and_all():
    (message,) = pairwise_question(PAIRWISE, PROMPT, "{second} {x}", "plain")
    assert message.role == "user"
    assert "Say {first}." in message.content
    assert "[Reply A]\n{second} {x}\n[End of reply A]" in message.content
    assert "[Reply B]\nplain\n[End of reply B]" in message.content


def test_replies_to_rank_are_numbered_and_conversations_name_their_speakers():
    prompt = (Message("system", "Be brief."), Message("user", "Hi"))
    (message,) = ranking_question(prompt, ["x", "y"])
    assert message.content.startswith("2 assistants")
    assert "system: Be brief.\n\nuser: Hi" in message.content
    assert "[Reply 1]\nx" in message.content
    assert "[Reply 2]\ny" in message.content


def test_a_template_of_ones_own_must_have_its_names(tmp_path):
    file = tmp_path / "t.txt"
    file.write_text("{prompt}: {first} or {second}?")
    assert read_judge_template(file) == "{prompt}: {first} or {second}?"
    file.write_text("{prompt} {first}")
    with pytest.raises(ConfigError, match=r"lacks \{second\}"):
        read_judge_template(file)
    with pytest.raises(ConfigError, match="cannot read"):
        read_judge_template(tmp_path / "missing.txt")
