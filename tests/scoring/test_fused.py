"""The fused score: its factor by hand, and one forward against two models."""

import math

import numpy as np
import pytest

from hafrm.errors import CheckpointError, ModelError
from hafrm.scoring.fused import (
    FusedRewardModel,
    FusedRule,
    fit_fused,
    fused_scores,
    per_token,
    read_fused_rule,
    write_fused_rule,
)
from hafrm.scoring.reward_model import ImplicitRule, PolicyModel, RewardModel, write_implicit_rule
from support.exports import export_both

PROMPT = "How do I bake bread?"
RESPONSES = ["Mix flour and water.", "No.", "I think that it is a good idea."]


def crossed(times: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Where only the reward differs it is right 3 times of 4, where only the other does 9 of 10."""
    reward = [1.0] * 3 + [-1.0] + [0.0] * 10
    implicit = [0.0] * 4 + [1.0] * 9 + [-1.0]
    return np.array(reward * times), np.array(implicit * times)


def test_the_factor_is_the_ratio_of_the_two_log_odds():
    """The sums do not meet: sigmoid(a) = 3/4 and sigmoid(b) = 9/10, so b / a = ln 9 / ln 3 = 2.

    A larger scale has a smaller factor; one that is right 1 time of 10 has b = -ln 9, which becomes 0.
    """
    reward, implicit = crossed()
    assert fit_fused(reward, implicit).factor == pytest.approx(2.0, rel=1e-5)
    reward, implicit = crossed(10)
    assert fit_fused(reward, 10 * implicit).factor == pytest.approx(0.2, rel=1e-5)
    assert fit_fused(100 * reward, implicit).factor == pytest.approx(200, rel=1e-5)
    assert fit_fused(reward, -implicit) == FusedRule(0.0, 140)


def test_one_that_is_as_often_right_as_wrong_has_the_factor_0():
    reward = np.array([1.0, 1.0, 1.0, -1.0] * 20 + [0.0] * 40)
    implicit = np.array([0.0] * 80 + [1.0, -1.0] * 20)
    assert fit_fused(reward, implicit).factor == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    ("reward", "implicit", "note"),
    [
        ([], [], "does not separate"),
        ([1.0, -1.0, 1.0], [0.0, 0.0, 0.0], "does not separate"),
        ([1.0, -1.0], [0.1, 3.0], "right about every comparison"),
        ([1.0, 1.0, -1.0], [2.0, 1.0, 3.0], "right about every comparison"),
        ([-1.0] * 3 + [1.0] + [0.0] * 4, [0.0] * 4 + [1.0] * 3 + [-1.0], "explains nothing"),
    ],
)
def test_where_nothing_can_be_estimated_the_reward_stands_alone(reward, implicit, note):
    """(1, 0.1) and (-1, 3) are both right by w = (1, 1): no finite coefficients are the likeliest."""
    rule = fit_fused(np.array(reward), np.array(implicit))
    assert rule.factor == 0.0
    assert note in rule.note


def test_a_fused_score_is_the_reward_and_the_factor_times_the_implicit_one_per_token():
    """1 + 0.2 * 0.5 and -1 + 0.2 * 2; 6 nat over 3 tokens are 2, unless the rule divides already."""
    scores = fused_scores(np.array([1.0, -1.0]), np.array([0.5, 2.0]), FusedRule(0.2))
    assert scores.tolist() == pytest.approx([1.1, -0.6])
    lengths = np.array([3, 4])
    implicit = np.array([6.0, -2.0], np.float32)
    assert per_token(implicit, lengths, ImplicitRule(None)).tolist() == [2.0, -0.5]
    assert per_token(implicit, lengths, ImplicitRule(None, per_token=True)).tolist() == [6, -2]


def test_a_rule_is_read_as_it_was_written_and_a_damaged_one_refused(tmp_path):
    rule = FusedRule(0.3, 17, "why")
    write_fused_rule(tmp_path, rule)
    assert read_fused_rule(tmp_path) == rule
    damaged = (
        "{",
        '{"factor": -1}',
        '{"factor": null}',
        '{"other": 1}',
        "[]",
        '{"factor": Infinity}',
    )
    for text in damaged:
        (tmp_path / "fused.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"fused\.json"):
            read_fused_rule(tmp_path)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose policy is judged against another checkpoint, as DPO's is."""
    folder = tmp_path_factory.mktemp("run")
    export_both(folder / "model")
    export_both(folder / "base", "llama-tied")
    rule = ImplicitRule(reference=str(folder / "base/policy"), beta=0.1)
    write_implicit_rule(folder / "model/policy", rule)
    write_fused_rule(folder / "model", FusedRule(0.7))
    return folder


def test_one_forward_gives_what_two_models_give(run):
    """reward + 0.7 * implicit / tokens, each by its own export: float32, 1e-5."""
    fused = FusedRewardModel.from_pretrained(run)
    rewards = RewardModel.from_pretrained(run / "model/reward").score(PROMPT, RESPONSES)
    judge = PolicyModel.from_pretrained(run / "model/policy")
    implicit = judge.score(PROMPT, RESPONSES)
    tokens = [
        len(judge.encoder.tokenizer(r, add_special_tokens=False).input_ids) + 1 for r in RESPONSES
    ]
    expected = [r + 0.7 * i / n for r, i, n in zip(rewards, implicit, tokens, strict=True)]
    assert max(abs(i / n) for i, n in zip(implicit, tokens, strict=True)) > 0.01
    assert fused.score(PROMPT, RESPONSES) == pytest.approx(expected, abs=1e-5)
    assert fused.best_of(PROMPT, RESPONSES).index == int(np.argmax(expected))
    gap = expected[0] - expected[1]
    chance = fused.probability(PROMPT, RESPONSES[0], RESPONSES[1])
    assert chance == pytest.approx(1 / (1 + math.exp(-gap)), abs=1e-5)


def test_a_run_and_its_model_folder_load_the_same_and_a_single_head_does_not(run, tmp_path):
    ours = FusedRewardModel.from_pretrained(run).score(PROMPT, "No.")
    assert FusedRewardModel.from_pretrained(run / "model").score(PROMPT, "No.") == ours
    for folder in (run / "model/reward", tmp_path):
        with pytest.raises(ModelError, match=r"no fused\.json|holds no model"):
            FusedRewardModel.from_pretrained(folder)
