"""Two models on the same comparisons: what differs, how sure that is, and how many sets were looked at."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from scipy import stats
from typer.testing import CliRunner

from hafrm.cli import app
from hafrm.engine.model import HybridModel
from hafrm.errors import ConfigError
from hafrm.evaluation import compare_models, evaluate
from hafrm.evaluation.comparisons import adjusted, compare_correct
from hafrm.recipe_file import dump_recipe
from hafrm.statistics import Difference, Estimate, paired_bootstrap, seeded_difference
from support.tiny_runs import tiny_recipe, write_preferences


@pytest.fixture(scope="module")
def model(exported) -> Path:
    return exported


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    one = write_preferences(tmp_path / "one.jsonl", num=8)
    return [str(one), str(write_preferences(tmp_path / "two.jsonl", num=6, start=100))]


def answers(seed: int, fraction: float = 0.7, num: int = 120, num_seeds: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).random((num_seeds, num)) < fraction


PROMPTS = np.arange(120)
PAIRED = np.repeat(np.arange(60), 2)


def test_one_model_on_each_side_gets_the_paired_bootstrap_and_mcnemars_exact_test() -> None:
    first, second = answers(0), answers(1, 0.5)
    difference = compare_correct(first, second, PROMPTS)
    assert difference.estimate == paired_bootstrap(first[0], second[0], PROMPTS)
    alone = int((first & ~second).sum()), int((second & ~first).sum())
    assert difference.p_value == pytest.approx(stats.binomtest(alone[0], sum(alone)).pvalue)


def test_with_several_comparisons_a_prompt_the_p_value_takes_prompts_as_trials() -> None:
    """Each prompt's two comparisons agree, so the test is that of 60 paired differences."""
    first, second = np.repeat(answers(2, num=60), 2)[None], np.repeat(answers(3, 0.5, 60), 2)[None]
    difference = compare_correct(first, second, PAIRED)
    gaps = (first[0].astype(float) - second[0])[::2]
    # the standard error divides by n, scipy's by n - 1: sqrt(59 / 60)
    expected = stats.ttest_1samp(gaps, 0).statistic * np.sqrt(60 / 59)
    assert difference.p_value == pytest.approx(2 * stats.t.sf(abs(expected), 59))
    single = compare_correct(first, second, PROMPTS)
    assert single.p_value < difference.p_value


def test_several_seeds_are_compared_over_prompts_and_seeds() -> None:
    first, second = answers(4, num_seeds=3), answers(5, 0.6, num_seeds=2)
    assert compare_correct(first, second, PAIRED) == seeded_difference(first, second, PAIRED)


def test_models_that_never_differ_have_p_one_and_those_that_always_do_nearly_zero() -> None:
    same = answers(6)
    assert compare_correct(same, same, PAIRED).p_value == 1.0
    right, wrong = np.ones((1, 120), bool), np.zeros((1, 120), bool)
    assert compare_correct(right, wrong, PAIRED).p_value == 0.0
    assert compare_correct(right, wrong, np.zeros(120)).p_value == 1.0  # one prompt says nothing


def test_the_p_values_of_the_sets_are_adjusted_for_their_number_and_all_is_no_set(
    model, files
) -> None:
    """0.01 and 0.04 of two sets: Holm doubles the first and leaves the second; their union stays out."""
    result = compare_models([model / "reward"], [model / "policy"], files)
    estimate = Estimate(0.1, 0.0, 0.2, 8, "cluster-bootstrap")
    fixed = [
        replace(s, difference=Difference(estimate, p))
        for s, p in zip(result.sets, (0.01, 0.04, 0.001), strict=True)
    ]
    assert [s.name for s in fixed] == ["one", "two", "all"]
    assert [s.p_adjusted for s in adjusted(fixed)] == [pytest.approx(0.02), 0.04, None]


def test_each_side_has_the_accuracy_that_evaluate_gives(model, files) -> None:
    result = compare_models([model / "reward"], [model / "policy"], files)
    for path, side in ((model / "reward", "first"), (model / "policy", "second")):
        accuracies = [s.accuracy for s in evaluate(path, files).sets]
        expected = [Estimate(a.value, a.low, a.high, a.num, a.method) for a in accuracies]
        assert [getattr(s, side) for s in result.sets] == expected
    for s in result.sets:
        assert s.difference.estimate.value == pytest.approx(s.first.value - s.second.value)
    (same,) = compare_models([model], [model / "reward"], files[:1]).sets
    assert (same.difference.estimate.value, same.difference.p_value, same.p_adjusted) == (0, 1, 1)


def test_seeds_of_one_side_alone_give_their_mean(model, files) -> None:
    paths = [model / "reward", model / "policy"]
    (only,) = compare_models(paths, [], files[:1]).sets
    assert only.second is only.difference is None
    mean = np.mean([evaluate(path, files[:1]).accuracy.value for path in paths])
    assert (only.first.value, only.first.method) == (
        pytest.approx(mean),
        "t over prompts and seeds",
    )
    with pytest.raises(ConfigError, match=r"2 models against 1.*several seeds on both sides"):
        compare_models([model, model], [model], files)


def test_the_command_tells_rivals_from_seeds_by_their_names(model, files, tmp_path) -> None:
    reward, policy, out = model / "reward", model / "policy", tmp_path / "out.json"
    for arguments, first, second in (
        ((reward, "--also", policy), [reward], [policy]),
        ((f"a={reward}", "--also", f"a={policy}"), [reward, policy], []),
        (
            (
                f"a={reward}",
                *("--also", f"a={policy}", "--also", f"b={policy}", "--also", f"b={policy}"),
            ),
            *([reward, policy], [policy, policy]),
        ),
    ):
        path, *options = map(str, arguments)
        result = CliRunner().invoke(app, ["evaluate", path, *files, *options, "--json", str(out)])
        assert result.exit_code == 0, result.output
        saved = json.loads(out.read_text())
        assert (saved["first"], saved["second"]) == ([*map(str, first)], [*map(str, second)])
        assert ("Holm" in result.output) == bool(second)
        assert ("over seeds" in result.output) == (len(first) > 1)
    for other, named in (("c=", "b, c"), ("", "without a name, b")):
        several = ["--also", f"b={policy}", "--also", f"{other}{reward}"]
        result = CliRunner().invoke(app, ["evaluate", str(reward), *files, *several])
        assert f"several rivals ({named})" in str(result.exception)


def test_a_run_is_evaluated_at_the_length_that_it_was_trained_at(model, files, tmp_path) -> None:
    """As its validation, its test result and `hafrm compare`; an exported directory has no run."""
    run = tmp_path / "run"
    shutil.copytree(model, run / "model")
    recipe = tiny_recipe(tmp_path, data={"max_length": 24, "max_prompt_length": 16})
    (run / "recipe.yaml").write_text(dump_recipe(recipe))
    whole, cut = (evaluate(path, files) for path in (model, run))
    assert whole.responses_cut == 0
    assert cut.prompts_cut > 0
    assert cut.accuracy == evaluate(run / "model", files).accuracy
    assert evaluate(run, files, max_length=128).accuracy == whole.accuracy
    right, wrong = (compare_models([path], [], files).sets[-1].first for path in (run, model))
    assert (right.value, wrong.value) == (cut.accuracy.value, whole.accuracy.value)


def test_both_heads_of_a_run_are_read_from_one_forward_and_of_two_backbones_from_two(
    model, files, tmp_path, monkeypatch
) -> None:
    forwards = []
    hidden_states = HybridModel.hidden_states

    def counted(self, *args, **kwargs):
        forwards.append(len(args))
        return hidden_states(self, *args, **kwargs)

    monkeypatch.setattr(HybridModel, "hidden_states", counted)
    apart = [evaluate(model / head, files).accuracy for head in ("reward", "policy")]
    num_apart = len(forwards)
    both = evaluate(model, files)
    assert (both.accuracy, both.sets[-1].implicit.accuracy) == tuple(apart)
    assert len(forwards) - num_apart == num_apart / 2

    other = tmp_path / "other"
    shutil.copytree(model, other)
    weights = load_file(other / "reward/model.safetensors")
    weights["model.norm.weight"] *= 1.5
    save_file(weights, other / "reward/model.safetensors", metadata={"format": "pt"})
    forwards.clear()
    assert evaluate(other, files).sets[-1].implicit.accuracy == apart[1]
    assert len(forwards) == num_apart
