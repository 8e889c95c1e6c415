"""Two models on the same comparisons: what differs, how sure that is, and how many sets were looked at."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from typer.testing import CliRunner

from exports_for_tests import export_both
from hafrm.cli import app
from hafrm.errors import ConfigError, DataError
from hafrm.evaluation import compare_models, evaluate
from hafrm.evaluation.paired import adjusted, compare_correct
from hafrm.statistics import Difference, Estimate, paired_bootstrap, seeded_difference
from support.tiny_runs import write_preferences


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "model"
    export_both(folder)
    return folder


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    one = write_preferences(tmp_path / "one.jsonl", num=8)
    return [str(one), str(write_preferences(tmp_path / "two.jsonl", num=6, start=100))]


def answers(seed: int, share: float = 0.7, num: int = 120, num_seeds: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).random((num_seeds, num)) < share


PROMPTS = np.arange(120)
PAIRED = np.repeat(np.arange(60), 2)


def test_one_model_on_each_side_gets_the_paired_bootstrap_and_mcnemars_exact_test() -> None:
    first, second = answers(0), answers(1, 0.5)
    difference, counts = compare_correct(first, second, PROMPTS)
    assert difference.estimate == paired_bootstrap(first[0], second[0], PROMPTS)
    alone = int((first & ~second).sum()), int((second & ~first).sum())
    assert (counts.num_first_only, counts.num_second_only) == alone
    assert difference.p_value == pytest.approx(stats.binomtest(alone[0], sum(alone)).pvalue)


def test_with_several_comparisons_a_prompt_the_p_value_takes_prompts_as_trials() -> None:
    """Each prompt's two comparisons agree, so the test is that of 60 paired differences."""
    first, second = np.repeat(answers(2, num=60), 2)[None], np.repeat(answers(3, 0.5, 60), 2)[None]
    difference, _ = compare_correct(first, second, PAIRED)
    gaps = (first[0].astype(float) - second[0])[::2]
    # the standard error divides by n, scipy's by n - 1: sqrt(59 / 60)
    expected = stats.ttest_1samp(gaps, 0).statistic * np.sqrt(60 / 59)
    assert difference.p_value == pytest.approx(2 * stats.t.sf(abs(expected), 59))
    single, _ = compare_correct(first, second, PROMPTS)
    assert single.p_value < difference.p_value


def test_several_seeds_are_compared_over_prompts_and_seeds() -> None:
    first, second = answers(4, num_seeds=3), answers(5, 0.6, num_seeds=2)
    difference, counts = compare_correct(first, second, PAIRED)
    assert difference == seeded_difference(first, second, PAIRED)
    assert counts is None


def test_models_that_never_differ_have_p_one_and_those_that_always_do_nearly_zero() -> None:
    same = answers(6)
    assert compare_correct(same, same, PAIRED)[0].p_value == 1.0
    right, wrong = np.ones((1, 120), bool), np.zeros((1, 120), bool)
    assert compare_correct(right, wrong, PAIRED)[0].p_value == 0.0
    assert compare_correct(right, wrong, np.zeros(120))[0].p_value == 1.0  # one prompt says nothing


def test_the_p_values_of_the_sets_are_adjusted_for_their_number_and_all_is_no_set(
    model, files
) -> None:
    """0.01 and 0.04 of two sets: Holm doubles the first and keeps the second; their sum stays out."""
    found = compare_models([model / "reward"], [model / "policy"], files)
    estimate = Estimate(0.1, 0.0, 0.2, 8, "cluster-bootstrap")
    from dataclasses import replace

    fixed = [
        replace(each, difference=Difference(estimate, p))
        for each, p in zip(found.sets, (0.01, 0.04, 0.001), strict=True)
    ]
    assert [each.name for each in fixed] == ["one", "two", "all"]
    assert [each.p_adjusted for each in adjusted(fixed)] == [pytest.approx(0.02), 0.04, None]


def test_each_side_has_the_accuracy_that_evaluate_gives(model, files) -> None:
    found = compare_models([model / "reward"], [model / "policy"], files)
    for path, side in ((model / "reward", "first"), (model / "policy", "second")):
        sets = evaluate(path, files).sets
        assert [getattr(each, side) for each in found.sets] == [
            Estimate(a.value, a.low, a.high, a.num, a.method) for a in (s.accuracy for s in sets)
        ]
    for each in found.sets:
        assert each.difference.estimate.value == pytest.approx(each.first.value - each.second.value)


def test_a_model_against_itself_differs_in_nothing(model, files) -> None:
    found = compare_models([model], [model / "reward"], files[:1])
    (only,) = found.sets
    assert only.difference.estimate.value == 0
    assert (only.difference.p_value, only.p_adjusted) == (1.0, 1.0)


def test_seeds_of_one_side_alone_give_their_mean(model, files) -> None:
    found = compare_models([model / "reward", model / "policy"], [], files[:1])
    (only,) = found.sets
    assert only.second is only.difference is None
    both = [evaluate(path, files[:1]).sets[0] for path in (model / "reward", model / "policy")]
    mean = np.mean([each.accuracy.value for each in both])
    assert only.first.value == pytest.approx(mean)
    assert only.first.method == "t over prompts and seeds"


def test_one_seed_against_several_is_refused(model, files) -> None:
    with pytest.raises(ConfigError, match=r"2 models against 1.*several seeds on both sides"):
        compare_models([model, model], [model], files)


def test_the_command_prints_the_difference_and_its_p_values(model, files, tmp_path) -> None:
    command = ["evaluate", str(model / "reward"), *files, "--against", str(model / "policy")]
    result = CliRunner().invoke(app, [*command, "--json", str(tmp_path / "out.json")])
    assert result.exit_code == 0, result.output
    for word in ("difference", "Holm", "one", "two", "all"):
        assert word in result.output
    saved = json.loads((tmp_path / "out.json").read_text())
    assert saved["sets"][0]["counts"]["num_first_only"] >= 0
    result = CliRunner().invoke(
        app, ["evaluate", str(model), *files, "--also", str(model / "reward")]
    )
    assert "over seeds" in result.output


def test_rows_that_cannot_be_used_may_be_allowed_for(model, tmp_path):
    file = write_preferences(tmp_path / "some.jsonl", num=8)
    file.write_text(file.read_text() + '{"prompt": "hm", "chosen": "", "rejected": "no"}\n')
    with pytest.raises(DataError, match="--max-bad-fraction"):
        evaluate(model, str(file))
    assert evaluate(model, str(file), max_bad_fraction=0.2).num_bad_rows == 1
