"""Comparisons of reward models: equal budgets, resumable cells, and the JSON that others read."""

import json
from pathlib import Path

import numpy as np
import pytest

from hafrm.best_of_n.judges import PairVerdict
from hafrm.errors import CheckpointError, ConfigError
from hafrm.rlhf import comparison_runs
from hafrm.rlhf.comparison_runs import (
    Answers,
    ComparisonRun,
    ComparisonWorker,
    plan_runs,
    recipe_for,
)
from hafrm.rlhf.policy_comparison import answer_wins, compare_policies
from hafrm.rlhf.train_policy import train_policy
from tiny_rlhf import tiny_rlhf, write_prompts, write_reward


def gold(_, text: str) -> float:
    return float(len(text))


def take(folder: Path, **options):
    recipe = tiny_rlhf(folder, training={"steps": 1}, evaluation={"every": 1})
    models = {"one": [str(folder / "reward")], "two": [str(write_reward(folder, "other", seed=5))]}
    models = options.pop("models", models)
    test = [str(write_prompts(folder / "test.jsonl", 6))]
    values = {"seeds": [0], "algorithms": ["ppo"], "test": test, "gold": gold} | options
    return compare_policies(recipe, models, folder / "out", **values)


def test_a_comparison_writes_its_contract_and_goes_on_where_it_was(tmp_path, monkeypatch):
    found = take(tmp_path)
    said = json.loads((tmp_path / "out/rlhf_comparison.json").read_text())
    assert said["models"] == ["one", "two"]
    assert said["seeds"] == [0]
    assert [curve["model"] for curve in said["curves"]] == ["one", "two"]
    assert said["curves"][0]["points"][0].keys() == {"step", "kl", "proxy", "gold"}
    assert [point["step"] for point in said["curves"][0]["points"]] == [0, 1]
    pairs = [(win["first"], win["second"]) for win in said["wins"]]
    assert pairs == [("start", "one"), ("start", "two"), ("one", "two")]
    for win in said["wins"]:
        values = [win[name]["value"] for name in ("win", "tie", "lose")]
        assert sum(values) == pytest.approx(1.0)
        assert win["difference"]["value"] == pytest.approx(values[0] - values[2])
    assert said["wins"][0]["reliability"] is None
    assert len(found.tables()) == 2
    monkeypatch.setattr(comparison_runs, "train_policy", None)  # nothing is left to be run
    again = take(tmp_path)
    assert (again.standings, again.wins, again.curves) == (
        found.standings,
        found.wins,
        found.curves,
    )


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path):
    one = take(tmp_path / "one", num_processes=1)
    two = take(tmp_path / "two", num_processes=2)
    assert (two.standings, two.wins, two.curves) == (one.standings, one.wins, one.curves)


def test_cells_differ_in_reward_model_algorithm_and_seed_alone(tmp_path):
    recipe = tiny_rlhf(tmp_path, reward={"clip": 2.0}, algorithm={"gamma": 0.9})
    cells = plan_runs({"a": ["A"], "b": ["B", "C"]}, ["ppo", "rloo"], [0, 1])
    assert [cell.folder for cell in cells[:3]] == ["a-ppo-0", "b-ppo-0", "a-rloo-0"]
    assert [cell.contender for cell in cells[:3]] == ["a ppo", "b ppo", "a rloo"]
    assert [cell.path for cell in cells if cell.model == "b"] == ["B", "B", "C", "C"]
    ours = recipe_for(recipe, ComparisonRun("b", "B", "ppo", 1, "b"))
    assert (ours.reward.models, ours.training.seed, ours.reward.clip) == (("B",), 1, 2.0)
    same = ours.model_copy(
        update={
            "reward": recipe.reward,
            "training": recipe.training,
        }
    )
    assert same == recipe
    theirs = recipe_for(recipe, ComparisonRun("b", "B", "rloo", 1, "b"))
    assert (theirs.algorithm.name, theirs.reward.clip, theirs.algorithm.gamma) == (
        "rloo",
        None,
        1.0,
    )
    assert theirs.algorithm.clip == recipe.algorithm.clip


def answers(texts: list[str], scores: list[float]) -> Answers:
    prompts = ((("user", "p"),), (("user", "q"),))
    return Answers("key", prompts, tuple(texts), tuple(scores))


KNOWN = {
    ("a", 0): answers(["x", "yy"], [1.0, 2.0]),
    ("b", 0): answers(["xx", "yy"], [0.0, 2.0]),
    ("a", 1): answers(["xxx", "y"], [3.0, 0.0]),
    ("b", 1): answers(["x", "yy"], [1.0, 1.0]),
}


def test_wins_are_counted_answer_by_answer_over_all_seeds():
    """a beats b on 2 of 4, ties on 1, loses 1: 50 %, 25 %, 25 %."""
    (found,) = answer_wins(KNOWN, [0, 1], None, "gold")
    assert (found.win.value, found.tie.value, found.lose.value) == (0.5, 0.25, 0.25)
    assert found.difference.value == 0.25
    assert (found.judge, found.same) == ("gold", 0.25)


def test_intervals_are_over_seeds_too():
    """One seed wins both, the other loses both: so two seeds say nothing of a third."""
    known = {
        ("a", 0): answers(["x", "y"], [1.0, 1.0]),
        ("b", 0): answers(["z", "z"], [0.0, 0.0]),
        ("a", 1): answers(["x", "y"], [0.0, 0.0]),
        ("b", 1): answers(["z", "z"], [1.0, 1.0]),
    }
    (found,) = answer_wins(known, [0, 1], None, "gold")
    assert found.difference.value == 0
    assert found.difference.high > 1  # Student's t with one degree of freedom
    (single,) = answer_wins({key: known[key] for key in list(known)[:2]}, [0], None, "gold")
    assert single.difference.value == 1


def test_a_finished_cell_of_another_reward_model_is_refused(tmp_path):
    take(tmp_path)
    models = {"one": [str(tmp_path / "other")], "two": [str(tmp_path / "other")]}
    with pytest.raises(CheckpointError, match="the recipe differs"):
        take(tmp_path, models=models)


class Longer:
    """A judge of pairs that prefers the longer text."""

    name = "longer"

    def cache_key(self):
        return {}

    def compare(self, pairs):
        return [PairVerdict(int(np.sign(len(p.first) - len(p.second)))) for p in pairs]


def test_a_judge_of_pairs_sees_both_answers_and_overrules_the_scores():
    """Lengths: 1 < 2, 2 = 2, 3 > 1, 1 < 2."""
    (found,) = answer_wins(KNOWN, [0, 1], Longer(), "gold")
    assert (found.win.value, found.tie.value, found.lose.value) == (0.25, 0.25, 0.5)
    assert found.judge == "longer"


def test_with_a_judge_of_pairs_alone_there_are_wins_and_no_scores(tmp_path):
    found = take(tmp_path, gold=None, judge=Longer(), models={"one": [str(tmp_path / "reward")]})
    assert found.scored_by == "nothing"
    assert [s.score for s in found.standings] == [None] * 2
    assert len(found.tables()) == 2


def test_without_gold_or_judge_nothing_is_run(tmp_path):
    with pytest.raises(ConfigError, match="nothing compares the policies"):
        take(tmp_path, gold=None)
    assert not (tmp_path / "out").exists()


def test_a_cell_that_was_started_is_resumed(tmp_path, monkeypatch):
    calls = []

    def recorded(recipe, folder, *, resume, gold):
        calls.append(resume)
        return train_policy(recipe, folder, resume=resume, gold=gold)

    monkeypatch.setattr(comparison_runs, "train_policy", recorded)
    monkeypatch.setattr(
        ComparisonWorker,
        "answers",
        lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt),
    )
    with pytest.raises(KeyboardInterrupt):
        take(tmp_path)
    model = tmp_path / "out/runs/one-ppo-0/model"
    model.rename(model.with_name("gone"))
    with pytest.raises(KeyboardInterrupt):
        take(tmp_path)
    assert calls == [False, True]
