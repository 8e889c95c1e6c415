"""A study: every method on every set with every seed, run once, and summed up by hand-checked rules."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from hafrm.data.reader import read_preferences
from hafrm.errors import CheckpointError, ConfigError, DivergedError, NumericsError
from hafrm.evaluation import evaluate
from hafrm.recipe import Recipe
from hafrm.results import read_result
from hafrm.scoring.reward_model import PolicyModel
from hafrm.study import study_runs
from hafrm.study.method_comparison import COMPARISON_FILE, compare_methods, scorers_of
from hafrm.study.run_grid import StudyPlan, parse_methods, parse_rates, plan_study
from hafrm.study.study_result import MIXED, Answers, StudyResult, domains, stack_answers, summarise
from hafrm.study.study_runs import SCORES_FILE, RunWorker, read_run_result
from hafrm.training import loop, setup
from support.tiny_runs import tiny_recipe, write_preferences


def study_recipe(folder: Path, *, num_sets: int = 2, **training: object) -> Recipe:
    """Training sets, two at most; test sets of one of them, and of a third that nothing is trained on."""
    if not (folder / "train").is_dir():
        for part in ("train", "test"):
            (folder / part).mkdir()
        write_preferences(folder / "train/sun.jsonl", 24)
        write_preferences(folder / "train/sea.jsonl", 24, start=100)
        write_preferences(folder / "test/sun.jsonl", 12, start=200)
        write_preferences(folder / "test/other.jsonl", 8, start=300)
    train = [str(folder / f"train/{name}.jsonl") for name in ("sun", "sea")][:num_sets]
    test = [str(folder / f"test/{name}.jsonl") for name in ("sun", "other")]
    return tiny_recipe(
        folder,
        data={"train": train, "test": test},
        training={"steps": 2, **training},
        evaluation={"every": 1, "metric": "loss"},
        checkpoint={"every": 0},
    )


def small_plan(
    folder: Path, methods: str = "bt,haf", num_seeds: int = 1, num_sets: int = 1
) -> StudyPlan:
    recipe = study_recipe(folder, num_sets=num_sets)
    return plan_study(recipe, methods.split(","), num_seeds=num_seeds, rates=[1e-3])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A study of two methods with one seed."""
    folder = tmp_path_factory.mktemp("study")
    plan = small_plan(folder, num_sets=2)
    return folder, plan, compare_methods(plan, folder / "out")


def test_methods_have_options_after_colons_and_rates_commas_between_them():
    bt, haf = parse_methods(["bt", "haf:alpha=0.05:policy_loss=ipo"])
    assert bt.section == {"name": "bt"}
    assert haf.section == {"name": "haf", "alpha": 0.05, "policy_loss": "ipo"}
    assert (parse_rates("1e-4, 3e-4"), parse_rates(None)) == ((1e-4, 3e-4), ())
    with pytest.raises(ConfigError, match="write 1e-4,3e-4"):
        parse_rates("fast")


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (["haff"], "did you mean haf\\?"),
        (["haf:alpha"], "as key=value"),
        (["bt:alpha=1"], "no policy loss"),
        (["bt", "bt"], "twice: bt"),
        ([" "], "no methods"),
    ],
)
def test_an_unknown_method_is_refused_before_anything_runs(methods, message):
    with pytest.raises(ConfigError, match=message):
        parse_methods(methods)


def test_runs_differ_in_set_method_seed_and_rate_and_in_nothing_else(tmp_path):
    plan = small_plan(tmp_path, num_seeds=2, num_sets=2)
    runs = plan.runs({"bt": 1e-3, "haf": 2e-3})
    assert len(runs) == 3 * 2 * 2  # two sets and both together, two seeds, two methods
    assert len({run.folder(tmp_path) for run in runs}) == len(runs)
    recipes = [plan.recipe_of(run) for run in runs]
    assert [r.data.train for r in recipes[-4:]] == [plan.recipe.data.train] * 4
    for run, recipe in zip(runs, recipes, strict=True):
        same = recipe.model_copy(
            update={
                "data": recipe.data.model_copy(update={"train": plan.recipe.data.train}),
                "method": plan.recipe.method,
                "training": recipe.training.model_copy(update={"seed": 0, "learning_rate": 1e-3}),
            }
        )
        assert same == plan.recipe
        assert (recipe.training.seed, recipe.method.name) == (run.seed, run.method.name)


def test_a_study_needs_test_sets_and_weights_that_fit_every_training_set(tmp_path):
    recipe = study_recipe(tmp_path)
    without = recipe.model_copy(update={"data": recipe.data.model_copy(update={"test": ()})})
    with pytest.raises(ConfigError, match=r"data\.test names no source"):
        plan_study(without, ["bt"], num_seeds=1)
    weighed = recipe.data.model_copy(update={"weights": (1.0, 2.0)})
    with pytest.raises(ConfigError, match=r"leave out data\.weights"):
        plan_study(recipe.model_copy(update={"data": weighed}), ["bt"], num_seeds=1)
    names = recipe.data.model_copy(update={"train": ("mixed.jsonl", "other.jsonl")})
    with pytest.raises(ConfigError, match="is called mixed"):
        plan_study(recipe.model_copy(update={"data": names}), ["bt"], num_seeds=1)


def test_rates_around_the_recipe_are_tried_unless_others_are_given(tmp_path):
    plan = plan_study(study_recipe(tmp_path), ["bt"], num_seeds=1)
    np.testing.assert_allclose(plan.rates, [1e-3 / 3, 1e-3, 3e-3])
    assert plan.tuning_runs()[0].train == MIXED
    assert [run.rate for run in plan.tuning_runs()] == list(plan.rates)


def test_a_method_is_scored_by_every_head_that_it_trains_its_own_first():
    haf, dpo, bt = parse_methods(["haf", "dpo", "bt"])
    assert list(scorers_of(haf).items()) == [("haf", "reward"), ("haf (implicit)", "implicit")]
    assert (scorers_of(dpo), scorers_of(bt)) == ({"dpo": "implicit"}, {"bt": "reward"})


def test_domains_pair_each_test_set_with_what_was_trained_on():
    """Sets a, b are trained on; test sets a, b, c: 2 in domain, 2 other, and c after a or b."""
    assert domains(["a", "b", MIXED], ["a", "b", "c"]) == {
        "in domain": [("a", "a"), ("b", "b")],
        "other domain": [("a", "b"), ("b", "a")],
        "held out": [("a", "c"), ("b", "c")],
        "mixed: in domain": [(MIXED, "a"), (MIXED, "b")],
        "mixed: held out": [(MIXED, "c")],
    }
    assert domains(["a"], ["a"]) == {"in domain": [("a", "a")]}
    parts = domains(["train", "hh-train"], ["test", "hh-test"])
    assert parts["in domain"] == [("train", "test"), ("hh-train", "hh-test")]
    assert "held out" not in parts


def outcome(*seeds: str) -> Answers:
    """Each seed's answers as a string of 1 and 0, a prompt for each comparison."""
    correct = np.array([[c == "1" for c in seed] for seed in seeds])
    prompts = np.array([f"p{i}" for i in range(correct.shape[1])])
    return np.where(correct, 1.0, -1.0), prompts


def test_an_average_counts_every_set_alike_whatever_its_size():
    """4 of 4 and 0 of 1: the mean of the sets is 1/2, of the comparisons 4/5."""
    values, clusters = stack_answers([("a", outcome("1111")), ("b", outcome("0"))])
    assert values.mean() == pytest.approx(0.5)
    assert list(clusters) == ["a p0", "a p1", "a p2", "a p3", "b p0"]


def test_the_summary_compares_every_scorer_with_the_first():
    """On a: 1 of 4 against 3 of 4; two seeds of each agree, so the difference is 1/2 exactly."""
    outcomes = {
        ("a", "bt", "a"): outcome("1000", "1000"),
        ("a", "haf", "a"): outcome("1110", "1110"),
    }
    got = summarise(outcomes)
    accuracies = got["accuracies"]
    assert [(a.method, a.accuracy.value) for a in accuracies] == [("bt", 0.25), ("haf", 0.75)]
    # margins of 1 and -1: ln(1 + 1/e) and ln(1 + e)
    assert accuracies[0].log_loss == pytest.approx(0.25 * 0.3132617 + 0.75 * 1.3132617)
    (difference,), (average,) = got["differences"], got["average_differences"]
    assert (difference.first, difference.second) == ("haf", "bt")
    assert difference.difference.value == average.difference.value == pytest.approx(0.5)
    assert average.p_adjusted == pytest.approx(average.p_value)


def test_the_result_on_disk_holds_the_whole_matrix_with_intervals(finished):
    folder, plan, result = finished
    assert read_result(folder / "out" / COMPARISON_FILE, StudyResult) == result
    assert result.methods == ("bt", "haf", "haf (implicit)")
    assert (result.train_sets, result.test_sets) == (("sun", "sea", MIXED), ("sun", "other"))
    assert len(result.accuracies) == 3 * 3 * 2
    assert all(0 <= a.accuracy.low <= a.accuracy.high <= 1 for a in result.accuracies)
    assert {c.second for c in result.differences} == {"bt"}
    assert list(result.pick_longer) == ["sun", "other"]
    assert [tuning.chosen for tuning in result.learning_rates] == [1e-3, 1e-3]
    # a finished run has its metrics, and no checkpoints
    run = plan.runs({"bt": 1e-3, "haf": 1e-3})[0].folder(folder / "out")
    assert (run / "metrics.jsonl").is_file() and not (run / "checkpoints").exists()


def test_finished_runs_are_not_run_again_and_more_seeds_run_only_what_is_new(finished, monkeypatch):
    folder, plan, result = finished
    ran = []

    def watched(recipe, run_folder, **options):
        ran.append(run_folder)
        return real(recipe, run_folder, **options)

    real = study_runs.run_training
    monkeypatch.setattr(study_runs, "run_training", watched)
    again = compare_methods(plan, folder / "out")
    assert ran == []
    assert again == result
    compare_methods(small_plan(folder, "bt", num_seeds=2, num_sets=2), folder / "out")
    assert len(ran) == 3
    assert all(path.name.endswith("seed-1") for path in ran)


def test_only_the_chosen_learning_rate_is_scored_and_it_is_not_trained_twice(tmp_path, monkeypatch):
    plan = plan_study(study_recipe(tmp_path), ["bt"], num_seeds=1, rates=[1e-4, 1e-3], mixed=False)
    out, steps = tmp_path / "out", []
    real = loop.take_step
    monkeypatch.setattr(loop, "take_step", lambda *a, **k: steps.append(1) or real(*a, **k))
    result = compare_methods(plan, out)
    assert len(steps) == 2 * (2 + 1)  # two steps each: both rates on the last set, one on the first
    for run in plan.tuning_runs():
        folder = run.folder(out)
        chosen = run.rate == result.learning_rates[0].chosen
        assert (folder / study_runs.SCORES_FILE).is_file() == chosen
        assert read_run_result(folder).is_scored == chosen
        assert not (folder / "checkpoints").exists()


def test_a_run_keeps_the_scores_of_the_heads_that_it_trains(tmp_path):
    plan = small_plan(tmp_path, methods="bt,dpo")
    assert compare_methods(plan, tmp_path / "out").methods == ("bt", "dpo")
    stored = {
        run.method.name: set(load_file(run.folder(tmp_path / "out") / SCORES_FILE))
        for run in plan.runs({"bt": 1e-3, "dpo": 1e-3})
    }
    assert stored == {"bt": {"reward"}, "dpo": {"implicit"}}


def test_a_run_that_was_stopped_is_resumed(tmp_path, monkeypatch):
    plan = small_plan(tmp_path, methods="bt")
    worker = RunWorker(plan, tmp_path / "out")
    run = plan.runs({"bt": 1e-3})[0]
    folder = run.folder(tmp_path / "out")

    def broken(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(worker, "_score", broken)
        with pytest.raises(KeyboardInterrupt):
            worker(run)
    assert read_run_result(folder) is None
    lines = (folder / "metrics.jsonl").read_text()
    assert worker(run).num_steps == 2
    assert (folder / "metrics.jsonl").read_text() == lines  # no step was run twice


def test_references_are_computed_in_the_precision_that_runs_train_in(tmp_path, monkeypatch):
    """On a device that computes in bfloat16, auto gives the numbers of bf16."""
    monkeypatch.setattr(setup, "has_bfloat16", lambda _: True)

    def references(precision: str) -> np.ndarray:
        recipe = study_recipe(tmp_path, precision=precision)
        plan = plan_study(recipe, ["dpo"], num_seeds=1, rates=[1e-3])
        return RunWorker(plan, tmp_path / "out")._test_references()

    auto, bf16, fp32 = (references(precision) for precision in ("auto", "bf16", "fp32"))
    np.testing.assert_array_equal(auto, bf16)
    assert not np.array_equal(auto, fp32)


def test_a_folder_of_another_recipe_or_of_other_test_data_is_refused(tmp_path):
    """The relabelled test file has as many responses as before."""
    plan = small_plan(tmp_path, methods="bt")
    compare_methods(plan, tmp_path / "out")
    other = plan_study(
        study_recipe(tmp_path, num_sets=1, steps=3), ["bt"], num_seeds=1, rates=[1e-3]
    )
    with pytest.raises(CheckpointError, match=r"different: recipe\.training"):
        compare_methods(other, tmp_path / "out")
    file = tmp_path / "test/other.jsonl"
    swapped = file.read_text().replace('"chosen"', '"x"').replace('"rejected"', '"chosen"')
    file.write_text(swapped.replace('"x"', '"rejected"'))
    with pytest.raises(CheckpointError, match="different: test data"):
        compare_methods(plan, tmp_path / "out")


def test_only_a_divergence_is_put_down_to_the_learning_rate(tmp_path, monkeypatch):
    """The self-check of shared prompts, say, or the replay of an export: no rate would help."""
    plan, error = small_plan(tmp_path, methods="bt"), [DivergedError("the loss is nan")]

    def fail(*_: object, **__: object) -> None:
        raise error[0]

    monkeypatch.setattr(study_runs, "run_training", fail)
    with pytest.raises(NumericsError, match=r"bt diverges at .*: give smaller --learning-rates"):
        compare_methods(plan, tmp_path / "out")
    error[0] = NumericsError("with shared prompts this model gives other numbers")
    with pytest.raises(NumericsError, match="shared prompts"):
        compare_methods(plan, tmp_path / "other")
    assert read_run_result(plan.tuning_runs()[0].folder(tmp_path / "other")) is None


@pytest.mark.slow
def test_scores_are_those_of_the_exported_models(tmp_path):
    recipe = study_recipe(tmp_path)
    names = ["bt", "haf", "dpo-logits"]
    plan = plan_study(recipe, names, num_seeds=1, rates=[1e-3], mixed=False)
    result = compare_methods(plan, tmp_path / "out", keep_models=True)
    accuracies = {(a.train, a.method, a.test): a.accuracy.value for a in result.accuracies}
    for run in plan.runs(dict.fromkeys(names, 1e-3)):
        folder = run.folder(tmp_path / "out")
        for part in evaluate(folder, recipe.data.test, max_length=64).sets[:-1]:
            value = accuracies[run.train, run.method.name, part.name]
            assert value == pytest.approx(part.accuracy.value)
        policy = folder / "model/policy"
        if policy.is_dir():
            groups = read_preferences(recipe.data.test).groups
            model = PolicyModel.from_pretrained(policy, max_length=64)
            stored = load_file(folder / SCORES_FILE)["implicit"]
            encoded, _ = model.encoder.encode(groups)
            assert stored == pytest.approx(model.score_encoded(encoded), abs=1e-4)


@pytest.mark.slow
def test_two_processes_find_what_one_finds(finished):
    folder, plan, _ = finished
    one = compare_methods(plan, folder / "out")
    two = compare_methods(plan, folder / "two", processes=2)
    assert two.accuracies == one.accuracies
    assert two.average_differences == one.average_differences
