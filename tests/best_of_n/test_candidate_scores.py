"""The reward of every candidate, and the names of models."""

import pytest

from hafrm.best_of_n.candidate_scores import named_models, score_by_gold, score_by_model
from hafrm.errors import ConfigError, NumericsError
from hafrm.preferences import Group, Message
from hafrm.scoring.loading import AUTO
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
        *scored, refused = score_by_model(str(tmp_path / path), GROUPS, AUTO)
        plain = kind.from_pretrained(tmp_path / (path or "reward"))
        for group, scores in zip(GROUPS, scored, strict=False):
            alone = plain.score(group.prompt[0].content, list(group.responses))
            assert scores == pytest.approx(alone, abs=1e-5)
        assert "more than 128 tokens" in refused


def test_a_gold_reward_that_is_not_finite_stops_the_job():
    with pytest.raises(NumericsError, match="gold reward of a is not finite"):
        score_by_gold(lambda *_: float("nan"), GROUPS)


def test_models_are_called_by_their_runs_or_as_they_are_named():
    paths = ["runs/haf", "runs/bt/model/reward", "runs/dpo/model/policy", "mine=runs/haf", "a/b=c"]
    assert named_models(paths) == [
        ("haf", "runs/haf"),
        ("bt", "runs/bt/model/reward"),
        ("dpo-policy", "runs/dpo/model/policy"),
        ("mine", "runs/haf"),
        ("b=c", "a/b=c"),
    ]
    with pytest.raises(ConfigError, match="NAME=PATH"):
        named_models(["mine="])
