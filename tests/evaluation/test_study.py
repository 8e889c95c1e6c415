"""A study: every method on every set with every seed, run once, and summed up by hand-checked rules."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmark_rows import write_all
from hafrm.errors import CheckpointError, ConfigError, NumericsError
from hafrm.evaluation.benchmarks.run import run_benchmarks
from hafrm.evaluation.evaluate import evaluate
from hafrm.evaluation.metrics import length_bias
from hafrm.evaluation.study import cell as cell_module
from hafrm.evaluation.study.cell import Setting, read_result
from hafrm.evaluation.study.outcomes import Outcome, pick_longer, rows_of, stacked
from hafrm.evaluation.study.plan import (
    MIXED,
    StudyPlan,
    parse_entrants,
    parse_rates,
    plan_study,
)
from hafrm.evaluation.study.study import RESULT, Tuning, compare_methods
from hafrm.evaluation.study.summary import domains, summarise
from hafrm.preferences import Comparison, Group, Message, TokenizedGroup
from hafrm.recipe import Recipe
from hafrm.recipe_file import build_recipe
from hafrm.statistics import Estimate, over_seeds
from hafrm.tables.study import study_tables
from tiny_runs import write_base, write_preferences


def study_recipe(folder: Path, **training: object) -> Recipe:
    """Two training sets; test sets of one of them, and of a third that nothing is trained on."""
    if not (folder / "base").is_dir():
        write_base(folder)
        for part in ("train", "test"):
            (folder / part).mkdir()
        write_preferences(folder / "train/sun.jsonl", 24)
        write_preferences(folder / "train/sea.jsonl", 24, start=100)
        write_preferences(folder / "test/sun.jsonl", 12, start=200)
        write_preferences(folder / "test/other.jsonl", 8, start=300)
    return build_recipe(
        {
            "model": {"path": str(folder / "base")},
            "data": {
                "train": [str(folder / "train/sun.jsonl"), str(folder / "train/sea.jsonl")],
                "test": [str(folder / "test/sun.jsonl"), str(folder / "test/other.jsonl")],
                "validation_fraction": 0.2,
                "max_length": 64,
            },
            "training": {
                "steps": 2,
                "batch_size": 4,
                "learning_rate": 1e-3,
                "max_tokens": 256,
                **training,
            },
            "evaluation": {"every": 1, "metric": "loss"},
            "checkpoint": {"every": 0},
        }
    )


def small_plan(folder: Path, methods: str = "bt,haf", num_seeds: int = 1) -> StudyPlan:
    return plan_study(study_recipe(folder), methods.split(","), num_seeds=num_seeds, rates=[1e-3])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A study of two methods with one seed."""
    folder = tmp_path_factory.mktemp("study")
    plan = small_plan(folder)
    return folder, plan, compare_methods(plan, folder / "out")


def test_a_method_is_written_with_its_options_after_colons():
    bt, haf = parse_entrants(["bt", "haf:alpha=0.05:policy_loss=ipo"])
    assert bt.section == {"name": "bt"}
    assert haf.section == {"name": "haf", "alpha": 0.05, "policy_loss": "ipo"}


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (["haff"], "did you mean 'haf'"),
        (["haf:alpha"], "write name:key=value"),
        (["bt:alpha=1"], "no policy loss"),
        (["bt", "bt"], "twice: bt"),
        ([" "], "no methods"),
    ],
)
def test_what_is_no_method_is_refused_before_anything_runs(methods, message):
    with pytest.raises(ConfigError, match=message):
        parse_entrants(methods)


def test_learning_rates_are_written_with_commas():
    assert parse_rates("1e-4, 3e-4") == (1e-4, 3e-4)
    assert parse_rates(None) == ()
    with pytest.raises(ConfigError, match="write 1e-4,3e-4"):
        parse_rates("fast")


def test_cells_differ_in_set_method_seed_and_rate_and_in_nothing_else(tmp_path):
    plan = small_plan(tmp_path, num_seeds=2)
    cells = plan.cells({"bt": 1e-3, "haf": 2e-3})
    assert len(cells) == 3 * 2 * 2  # two sets and both together, two seeds, two methods
    assert len({cell.folder(tmp_path) for cell in cells}) == len(cells)
    recipes = [cell.recipe(plan.recipe) for cell in cells]
    assert [r.data.train for r in recipes[-4:]] == [plan.recipe.data.train] * 4
    for cell, recipe in zip(cells, recipes, strict=True):
        same = recipe.model_copy(
            update={
                "data": recipe.data.model_copy(update={"train": plan.recipe.data.train}),
                "method": plan.recipe.method,
                "training": recipe.training.model_copy(update={"seed": 0, "learning_rate": 1e-3}),
            }
        )
        assert same == plan.recipe
        assert (recipe.training.seed, recipe.method.name) == (cell.seed, cell.entrant.name)


def test_a_study_needs_test_sets_and_weights_that_fit_every_training_set(tmp_path):
    recipe = study_recipe(tmp_path)
    without = recipe.model_copy(update={"data": recipe.data.model_copy(update={"test": ()})})
    with pytest.raises(ConfigError, match=r"data\.test names no source"):
        plan_study(without, ["bt"], num_seeds=1)
    weighed = recipe.data.model_copy(update={"weights": (1.0, 2.0)})
    with pytest.raises(ConfigError, match="take uniform"):
        plan_study(recipe.model_copy(update={"data": weighed}), ["bt"], num_seeds=1)


def test_rates_around_the_recipe_are_tried_unless_others_are_given(tmp_path):
    plan = plan_study(study_recipe(tmp_path), ["bt"], num_seeds=1)
    np.testing.assert_allclose(plan.rates, [1e-3 / 3, 1e-3, 3e-3])
    assert plan.tuning_set.name == MIXED
    assert [cell.rate for cell in plan.tuning_cells()] == list(plan.rates)


def test_the_longer_response_is_the_longer_text_though_both_are_cut_to_one_length():
    ids = np.zeros(3, np.int32)
    comparisons = (Comparison(1, 0), Comparison(0, 1))
    group = Group(
        "a", (Message("user", "hm"),), ("short and cut", "longer and cut too"), comparisons
    )
    encoded = TokenizedGroup(ids, (ids, ids), comparisons, "a")
    (scored,) = pick_longer(cell_module.TestSets([group], [encoded])).values()
    np.testing.assert_array_equal(scored.margins, [5, -5])
    bias = length_bias(scored.margins, scored.chosen_lengths, scored.rejected_lengths)
    assert (bias.pick_longer.num_correct, bias.pick_longer.num_equal) == (1, 0)


def test_a_rate_that_is_best_at_an_end_has_one_beyond_it_to_try():
    def beyond(chosen: float, *tried: float) -> float | None:
        return Tuning("bt", MIXED, chosen, dict.fromkeys(tried)).beyond()

    assert beyond(4.0, 1.0, 2.0, 4.0) == 8.0
    assert beyond(1.0, 4.0, 1.0, 2.0) == 0.5
    assert beyond(2.0, 1.0, 2.0, 4.0) is None
    assert beyond(1.0, 1.0) is None  # one rate has no spacing


def test_rates_are_continued_until_the_best_is_inside_unless_they_were_given(tmp_path):
    """A run of two steps learns more the higher its rate, so the search goes up, three times at most."""
    low = study_recipe(tmp_path, learning_rate=1e-7)
    plan = plan_study(low, ["bt"], num_seeds=1, mixed=False)
    (tuning,) = compare_methods(plan, tmp_path / "out").tunings
    np.testing.assert_allclose(list(tuning.tried), 1e-7 * 3.0 ** np.arange(-1, 5), rtol=1e-6)
    given = plan_study(low, ["bt"], num_seeds=1, mixed=False, rates=[1e-7, 3e-7])
    (tuning,) = compare_methods(given, tmp_path / "out").tunings
    assert list(tuning.tried) == [1e-7, 3e-7]


def test_a_method_with_two_heads_has_three_rows():
    haf, dpo = parse_entrants(["haf", "dpo"])
    assert rows_of(haf) == {"haf": "reward", "haf (implicit)": "implicit", "haf (fused)": "fused"}
    assert rows_of(dpo) == {"dpo": "implicit"}


def test_domains_pair_each_test_set_with_what_was_trained_on():
    """Sets a, b are trained on; test sets a, b, c: 2 in domain, 2 other, and c after a or b."""
    found = domains(["a", "b", MIXED], ["a", "b", "c"])
    assert found == {
        "in domain": [("a", "a"), ("b", "b")],
        "other domain": [("a", "b"), ("b", "a")],
        "held out": [("a", "c"), ("b", "c")],
        "mixed: in domain": [(MIXED, "a"), (MIXED, "b")],
        "mixed: held out": [(MIXED, "c")],
    }
    assert domains(["a"], ["a"]) == {"in domain": [("a", "a")]}


def outcome(*seeds: str) -> Outcome:
    """Each seed's answers as a string of 1 and 0, a prompt for each comparison."""
    correct = np.array([[c == "1" for c in seed] for seed in seeds])
    prompts = np.array([f"p{i}" for i in range(correct.shape[1])])
    return Outcome(correct, np.where(correct, 1.0, -1.0), prompts)


def test_an_average_counts_every_set_alike_whatever_its_size():
    """4 of 4 and 0 of 1: the mean of the sets is 1/2, of the comparisons 4/5."""
    values, clusters = stacked([("a", outcome("1111")), ("b", outcome("0"))])
    assert values.mean() == pytest.approx(0.5)
    assert list(clusters) == ["a p0", "a p1", "a p2", "a p3", "b p0"]


def test_the_summary_sets_every_row_against_the_first():
    """On a: 1 of 4 against 3 of 4; two seeds of each agree, so the difference is 1/2 exactly."""
    outcomes = {
        ("a", "bt", "a"): outcome("1000", "1000"),
        ("a", "haf", "a"): outcome("1110", "1110"),
    }
    found = summarise(outcomes)
    assert [(c.method, c.accuracy.value) for c in found.cells] == [("bt", 0.25), ("haf", 0.75)]
    assert found.cells[1].per_seed == (0.75, 0.75)
    (difference,) = found.differences
    assert (difference.first, difference.second) == ("haf", "bt")
    assert difference.difference.value == pytest.approx(0.5)
    (average,) = found.average_differences
    assert average.difference.value == pytest.approx(0.5)
    assert average.p_adjusted == pytest.approx(average.p_value)


def test_the_result_on_disk_holds_the_whole_matrix_with_intervals(finished):
    folder, _, _ = finished
    found = json.loads((folder / "out" / RESULT).read_text())
    rows = ["bt", "haf", "haf (implicit)", "haf (fused)"]
    assert found["methods"] == rows
    assert found["train_sets"] == ["sun", "sea", MIXED]
    assert found["test_sets"] == ["sun", "other"]
    assert len(found["cells"]) == 3 * 4 * 2
    assert all(0 <= c["accuracy"]["low"] <= c["accuracy"]["high"] <= 1 for c in found["cells"])
    assert {c["second"] for c in found["differences"]} == {"bt"}
    assert len(found["baselines"]) == 2
    assert [each["chosen"] for each in found["learning_rates"]] == [1e-3, 1e-3]


def test_the_tables_show_an_interval_beside_every_accuracy(finished):
    titles = [getattr(table, "title", "") for table in study_tables(finished[2])]
    assert "trained on mixed" in " ".join(map(str, titles))


def test_finished_cells_are_not_run_again_and_more_seeds_run_only_what_is_new(
    finished, monkeypatch
):
    folder, plan, study = finished
    ran = []

    def watched(recipe, run_folder, **options):
        ran.append(run_folder)
        return real(recipe, run_folder, **options)

    real = cell_module.train
    monkeypatch.setattr(cell_module, "train", watched)
    again = compare_methods(plan, folder / "out")
    assert ran == []
    assert again.summary == study.summary
    compare_methods(small_plan(folder, methods="bt,haf", num_seeds=2), folder / "out")
    assert len(ran) == 3 * 2
    assert all(path.name.endswith("seed-1") for path in ran)


def test_a_finished_cell_keeps_its_metrics_and_no_checkpoints(finished):
    folder, plan, _ = finished
    cell = plan.tuning_cells()[0].folder(folder / "out")
    assert (cell / "metrics.jsonl").is_file()
    assert not (cell / "checkpoints").exists()


def test_a_cell_that_was_stopped_goes_on_where_it_was(tmp_path, monkeypatch):
    plan = small_plan(tmp_path, methods="bt")
    runner = cell_module.CellRunner(Setting(plan.recipe, tmp_path / "out"))
    cell = plan.tuning_cells()[0]
    folder = cell.folder(tmp_path / "out")

    def broken(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runner, "_score", broken)
        with pytest.raises(KeyboardInterrupt):
            runner(cell)
    assert read_result(folder) is None
    lines = (folder / "metrics.jsonl").read_text()
    assert runner(cell).num_steps == 2
    assert (folder / "metrics.jsonl").read_text() == lines  # no step was run twice


def test_a_folder_of_another_recipe_is_refused(finished):
    folder, _, _ = finished
    other = plan_study(study_recipe(folder, steps=3), ["bt"], num_seeds=1, rates=[1e-3])
    with pytest.raises(CheckpointError, match="another recipe"):
        compare_methods(other, folder / "out")


def test_a_rate_at_which_every_run_diverges_is_an_error_that_says_so(tmp_path, monkeypatch):
    def diverge(*_: object, **__: object) -> None:
        raise NumericsError("the loss is nan")

    monkeypatch.setattr(cell_module, "train", diverge)
    with pytest.raises(NumericsError, match="bt diverges at every learning rate"):
        compare_methods(small_plan(tmp_path, methods="bt"), tmp_path / "out")


@pytest.mark.slow
def test_scores_and_benchmarks_are_those_of_the_exported_models(tmp_path):
    data = write_all(tmp_path / "files")
    recipe = study_recipe(tmp_path)
    plan = plan_study(recipe, ["bt", "haf"], num_seeds=1, rates=[1e-3], mixed=False)
    out = tmp_path / "out"
    study = compare_methods(
        plan, out, keep_models=True, benchmarks=["rewardbench2"], benchmark_data=data
    )
    known = {(c.train, c.method, c.test): c.accuracy.value for c in study.summary.cells}
    scores = {(c.train, c.method): c.score.value for c in study.benchmarks}
    for cell in plan.cells({"bt": 1e-3, "haf": 1e-3}):
        train, method, folder = cell.train.name, cell.entrant.name, cell.folder(out)
        for part in evaluate(folder, recipe.data.test, max_length=64).sets[:-1]:
            value = part.metrics.accuracy.estimate.value
            assert known[train, method, part.name] == pytest.approx(value)
        verb = run_benchmarks(folder, ["rewardbench2"], folder=data, max_length=64)
        value = verb.results[0].scores["reward"].overall.value
        assert scores[train, method] == pytest.approx(value)


def test_a_mean_over_seeds_adds_the_spread_of_items_and_of_seeds_in_squares():
    """Values 0.4 and 0.6, each +- 0.1 over items: t(1) 12.706 x 0.1414 / 1.414 = 1.2706 over seeds."""
    both = [
        Estimate(value, value - 0.1, value + 0.1, 10, "wilson", proportion=False)
        for value in (0.4, 0.6)
    ]
    found = over_seeds(both)
    assert found.value == pytest.approx(0.5)
    assert found.high - found.value == pytest.approx(np.hypot(0.1, 1.27062), rel=1e-4)
    assert over_seeds(both[:1]) == both[0]


@pytest.mark.slow
def test_two_processes_find_what_one_finds(finished):
    folder, plan, _ = finished
    one = compare_methods(plan, folder / "out")
    two = compare_methods(plan, folder / "two", processes=2)
    assert two.summary == one.summary
