"""Reward models compared by their policies, and the verb `rlhf` as a user meets it."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hafrm.cli import app
from hafrm.errors import CheckpointError, ConfigError
from hafrm.recipe_file import build_as, dump_recipe
from hafrm.results import to_plain
from hafrm.rlhf import policy_comparison
from hafrm.rlhf.policy_comparison import ComparisonRun, compare_policies, plan_runs
from hafrm.rlhf.rlhf_recipe import RlhfRecipe
from support.length_judge import Longer
from support.tiny_rlhf import tiny_rlhf, write_prompts, write_reward


def gold(_, text: str) -> float:
    return float(len(text))


def comparison(folder: Path, **sections) -> RlhfRecipe:
    """Two reward models, one step each."""
    if not (folder / "other").is_dir():
        write_reward(folder, "other", seed=5)
    models = [f"one={folder / 'reward'}", f"two={folder / 'other'}"]
    test = [str(write_prompts(folder / "test.jsonl", 6))]
    steps = {"training": {"steps": 1}, "evaluation": {"every": 1}}
    return tiny_rlhf(folder, comparison={"models": models, "test": test}, **steps | sections)


def invoke(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    return result.exit_code, result.output


def recipe_file(folder: Path, recipe: RlhfRecipe) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(dump_recipe(recipe))
    return file


def test_a_comparison_writes_its_contract_and_repeats_no_finished_run(tmp_path, monkeypatch):
    recipe = comparison(tmp_path, evaluation={"reward_model": str(tmp_path / "other")})
    file = recipe_file(tmp_path, recipe)
    code, output = invoke("rlhf", file, "--out", tmp_path / "out", "--processes", 1)
    assert code == 0, output
    assert "test answers, scored by" in output
    assert "answers against each other" in output
    written = json.loads((tmp_path / "out/rlhf_comparison.json").read_text())
    assert (written["models"], written["seeds"]) == (["one", "two"], [0])
    pairs = [(win["first"], win["second"]) for win in written["wins"]]
    assert pairs == [("start", "one"), ("start", "two"), ("one", "two")]
    for win in written["wins"]:
        values = [win[name]["value"] for name in ("win", "tie", "lose")]
        assert sum(values) == pytest.approx(1.0)
        assert win["difference"]["value"] == pytest.approx(values[0] - values[2])
    answers = json.loads((tmp_path / "out/runs/one-0/answers.json").read_text())
    assert len(answers["texts"]) == len(answers["prompts"]) == 6
    monkeypatch.setattr(policy_comparison, "train_policy", None)  # nothing is left to train
    again = compare_policies(recipe, tmp_path / "out")
    assert to_plain([again.standings, again.wins]) == [written["standings"], written["wins"]]
    models = {"models": (f"one={tmp_path / 'other'}",)}
    swapped = recipe.model_copy(update={"comparison": recipe.comparison.model_copy(update=models)})
    with pytest.raises(CheckpointError, match="the recipe differs"):
        compare_policies(swapped, tmp_path / "out")


def test_a_run_that_was_started_is_resumed(tmp_path, monkeypatch):
    recipe = comparison(tmp_path, checkpoint={"every": 1})
    calls, train = [], policy_comparison.train_policy

    def recorded(recipe, folder, *, resume, gold):
        calls.append(resume)
        result = train(recipe, folder, resume=resume, gold=gold)
        if not resume:
            (folder / "model").rename(folder / "gone")
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(policy_comparison, "train_policy", recorded)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            compare_policies(recipe, tmp_path / "out", gold=gold)
    assert calls == [False, True, False]


def test_runs_differ_in_reward_model_and_seed_alone(tmp_path):
    runs = plan_runs(["a=A", "b=B", "b=C"], 2)
    assert [run.folder for run in runs] == ["a-0", "b-0", "a-1", "b-1"]
    assert [run.path for run in runs if run.model == "b"] == ["B", "C"]
    recipe = comparison(tmp_path, reward={"clip": 2.0}, training={"precision": "fp32"})
    own = ComparisonRun("b", "B", 1).recipe(recipe)
    assert (own.reward.model, own.training.seed, own.reward.clip) == ("B", 1, 2.0)
    assert own.comparison is None
    same = {name: getattr(recipe, name) for name in ("reward", "training", "comparison")}
    assert own.model_copy(update=same) == recipe
    assert build_as(RlhfRecipe, own.model_dump(mode="json")) == own


def test_with_a_judge_alone_there_are_wins_and_no_scores_and_without_anything_an_error(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(policy_comparison, "load_judge", lambda *_: Longer())
    recipe = comparison(tmp_path)
    with pytest.raises(ConfigError, match="nothing compares the policies"):
        compare_policies(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    asked = recipe.comparison.model_copy(update={"judge": "http://x"})
    result = compare_policies(recipe.model_copy(update={"comparison": asked}), tmp_path / "out")
    assert result.scored_by == "nothing"
    assert [s.score for s in result.standings] == [None] * 3
    assert len(result.tables()) == 2


def test_the_verb_trains_says_what_it_selected_and_leaves_a_finished_run(tmp_path):
    file = recipe_file(tmp_path, tiny_rlhf(tmp_path, training={"steps": 1}))
    code, output = invoke("rlhf", file, "training.seed=3", "--out", tmp_path / "run")
    assert code == 0, output
    assert "1 of 1 steps; exported step" in output
    assert "best by its held-out penalised measure" in output
    assert json.loads((tmp_path / "run/provenance.json").read_text())["sessions"][0]["seed"] == 3
    assert invoke("rlhf", "--resume", tmp_path / "run") == (0, output)


def test_a_run_that_the_watchdog_stops_ends_with_1_and_exports(tmp_path):
    wild = {"training": {"steps": 9, "learning_rate": 3.0}, "watch": {"max_kl": 1.0, "patience": 1}}
    file = recipe_file(tmp_path, tiny_rlhf(tmp_path, **wild))
    code, output = invoke("rlhf", file, "--out", tmp_path / "run")
    assert code == 1
    assert "stopped early: the KL from the start policy" in output
    assert (tmp_path / "run/model/policy").is_dir()
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["num_steps"] < 9


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("reward.model=null", "reward.model is missing"),
        ("judge.model=m", "need comparison.judge"),
        ("comparison.models=[a=b]", "comparison.test: missing"),
        ("--gold=silver", "--gold is 'silver'"),
    ],
)
def test_what_cannot_be_understood_is_refused_with_the_fix(tmp_path, assignment, message):
    file = recipe_file(tmp_path, tiny_rlhf(tmp_path))
    result = CliRunner().invoke(app, ["rlhf", str(file), assignment, "--out", str(tmp_path / "o")])
    assert message in str(result.exception)


def test_policies_that_gold_selected_are_not_reused_without_it(tmp_path):
    """No recipe names gold, which selects the steps."""
    recipe = comparison(tmp_path, evaluation={"every": 1, "reward_model": str(tmp_path / "other")})
    compare_policies(recipe, tmp_path / "out", gold=gold)
    with pytest.raises(CheckpointError, match=r"--gold.*--out"):
        compare_policies(recipe, tmp_path / "out")
