"""Scorers: the reward of every candidate, stored, and the names of models."""

import pytest

from hafrm.best_of_n.candidate_scores import (
    GoldScorer,
    ModelScorer,
    file_name,
    named_models,
    score_all,
)
from hafrm.errors import ConfigError, DataError, NumericsError
from hafrm.preferences import Group, Message
from hafrm.run_folder import RecordFile
from hafrm.scoring.reward_model import PolicyModel, RewardModel
from support.exports import export_both

GROUPS = [
    Group("a", (Message("user", "How do I bake bread?"),), ("Mix flour.", "No.", "Wait and see.")),
    Group("b", (Message("user", "Tell me."),), ("A story.", "No.")),
    Group("long", (Message("user", "word " * 200),), ("A story.", "No.")),
]


def test_scores_are_those_of_each_prompt_alone_and_too_long_is_said(tmp_path):
    export_both(tmp_path)
    for path, kind in (("", RewardModel), ("policy", PolicyModel)):
        scorer = ModelScorer(tmp_path / path, "m")
        *scored, refused = scorer.score(GROUPS)
        plain = kind.from_pretrained(tmp_path / (path or "reward"))
        for group, scores in zip(GROUPS, scored, strict=False):
            alone = plain.score(group.prompt[0].content, list(group.responses))
            assert scores == pytest.approx(alone, abs=1e-5)
        assert "longer than 128 tokens" in refused
        assert scorer.score([]) == []
        assert ModelScorer(tmp_path / path).cache_key() == scorer.cache_key()
    reward, policy = (ModelScorer(tmp_path / head) for head in ("reward", "policy"))
    assert reward.cache_key() != policy.cache_key()


def test_scores_that_are_in_the_file_are_not_computed_again(tmp_path):
    asked = []

    def gold(prompt, response):
        asked.append(response)
        if prompt[-1].content == "Tell me.":
            raise DataError("no such prompt")
        return float(len(response))

    first = score_all(GoldScorer("g", gold), GROUPS[:2], RecordFile(tmp_path / "g.jsonl"))
    assert first[0].tolist() == [10.0, 3.0, 13.0]
    assert first[1] == "unknown prompt: no such prompt"
    asked.clear()
    again = score_all(GoldScorer("g", gold), GROUPS, RecordFile(tmp_path / "g.jsonl"))
    assert again[0].tolist() == first[0].tolist()
    assert again[1] == first[1]
    assert asked == ["A story.", "No."]


def test_a_score_that_is_not_finite_stops_the_job(tmp_path):
    scorer = GoldScorer("g", lambda *_: float("nan"))
    with pytest.raises(NumericsError, match="g gives a a score that is not finite"):
        score_all(scorer, GROUPS, RecordFile(tmp_path / "g.jsonl"))
    assert not (tmp_path / "g.jsonl").exists()


def test_models_are_called_by_their_runs_or_as_they_are_named():
    assert named_models(
        ["runs/haf", "runs/bt/model/reward", "runs/dpo/model/policy", "mine=runs/haf", "a/b=c"]
    ) == [
        ("haf", "runs/haf"),
        ("bt", "runs/bt/model/reward"),
        ("dpo-policy", "runs/dpo/model/policy"),
        ("mine", "runs/haf"),
        ("b=c", "a/b=c"),
    ]
    with pytest.raises(ConfigError, match="NAME=PATH"):
        named_models(["mine="])
    assert (file_name("a/run"), file_name("..")) == ("a_run", "model")
