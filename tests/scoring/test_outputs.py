"""Reward, implicit reward and the parts of tokens: by name, from one forward."""

import json
import shutil

import numpy as np
import pytest

from hafrm.bulk.bulk_job import BulkOptions, score_files
from hafrm.engine.model import HybridModel
from hafrm.errors import ModelError
from hafrm.scoring.outputs import ModelOutputs
from hafrm.scoring.reward_model import IMPLICIT_RULE, PolicyModel, RewardModel
from support.exports import GOLDEN_GROUP

ALL = ("reward", "implicit", "tokens")


@pytest.fixture(scope="module")
def run(exported, tmp_path_factory):
    """Both heads of one run; the policy has no reference."""
    folder = shutil.copytree(exported, tmp_path_factory.mktemp("both") / "model")
    rule = {"reference": None, "beta": 0.1, "per_token": False}
    (folder / "policy" / IMPLICIT_RULE).write_text(json.dumps(rule))
    return folder


def test_every_output_is_what_its_own_model_gives(run, monkeypatch):
    """From one forward; the parts of the tokens sum to the implicit reward."""
    forwards, forward = [], HybridModel.forward

    def counting(self, layout):
        forwards.append(layout)
        return forward(self, layout)

    model = ModelOutputs(run, ALL)
    groups, _ = model.scorer.encoder.encode([GOLDEN_GROUP])
    monkeypatch.setattr(HybridModel, "forward", counting)
    (scores,) = model.score(groups, ALL)
    assert len(forwards) == 1
    rewards = RewardModel.from_pretrained(run / "reward").score_encoded(groups)
    implicit = PolicyModel.from_pretrained(run / "policy").score_encoded(groups)
    lengths = [len(ids) for ids in groups[0].response_ids]
    assert scores["reward"] == pytest.approx(rewards.tolist(), abs=1e-6)
    assert scores["implicit"] == pytest.approx(implicit.tolist(), rel=1e-6)
    assert [len(own) for own in scores["tokens"]] == lengths
    assert [sum(own) for own in scores["tokens"]] == pytest.approx(implicit.tolist(), rel=1e-5)
    (alone,) = model.score(groups, ["reward"])
    assert alone["reward"] == pytest.approx(scores["reward"], abs=1e-6)


def test_a_reference_is_taken_from_every_token(run, exported):
    """The policy as its own reference: every part is 0, and so is their sum."""
    model = ModelOutputs(run, ["implicit", "tokens"], reference=exported / "policy")
    groups, _ = model.scorer.encoder.encode([GOLDEN_GROUP])
    (scores,) = model.score(groups, ["implicit", "tokens"])
    assert scores["implicit"] == [0.0] * 3
    assert not np.concatenate(scores["tokens"]).any()


def test_copies_run_once_and_get_the_same_score(run, monkeypatch):
    sizes, forward = [], HybridModel.forward

    def counting(self, layout):
        sizes.append(layout.num_responses)
        return forward(self, layout)

    monkeypatch.setattr(HybridModel, "forward", counting)
    rm = RewardModel.from_pretrained(run)
    scores = rm.score_batch(["Say a.", "Say b.", "Say a."], [["x", "y", "x"], ["x"], ["y", "z"]])
    assert sum(sizes) == 4
    assert scores[0][0] == scores[0][2] and scores[0][1] == scores[2][0]
    assert scores[0][0] != scores[1][0]


def test_what_a_model_lacks_and_unknown_names_are_refused(exported, run, tmp_path):
    with pytest.raises(ModelError, match="gives reward, implicit, tokens, not implict"):
        ModelOutputs(run, ["implict"])
    with pytest.raises(ModelError, match="gives reward, not tokens"):
        ModelOutputs(exported / "reward", ["tokens"])
    other = shutil.copytree(run, tmp_path / "other")
    config = json.loads((other / "policy" / "tokenizer_config.json").read_text())
    config["eos_token"] = config["pad_token"]
    (other / "policy" / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="do not share a backbone"):
        ModelOutputs(other, ["reward", "implicit"])


def test_files_get_every_output(run, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({"prompt": "Say sun.", "responses": ["sun", "no", "sun"]}) + "\n")
    score_files(run, [str(source)], tmp_path / "out", BulkOptions(outputs=ALL))
    row = json.loads((tmp_path / "out" / "in.jsonl").read_text())
    assert row["rewards"] == pytest.approx(
        RewardModel.from_pretrained(run).score("Say sun.", ["sun", "no", "sun"]), abs=1e-6
    )
    assert row["implicit_rewards"][0] == row["implicit_rewards"][2]
    assert [sum(own) for own in row["token_rewards"]] == pytest.approx(
        row["implicit_rewards"], rel=1e-5
    )
