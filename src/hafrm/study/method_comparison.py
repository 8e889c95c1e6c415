"""`compare_methods`: train every method on every set with every seed, and test which one is better.

    OUT/recipe.yaml   runs/<training set>/<method>/rate-R-seed-S/   comparison.json

First each method's learning rate is chosen, by validation on the last training set (all of them mixed, if
there are several) with the first seed; then the runs of all sets and seeds follow. The same command
resumes a comparison that was killed; further methods, sets or seeds in the same folder run only what is
new.
"""

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hafrm.atomic import atomic_write
from hafrm.benchmarks.benchmark_scores import score_benchmark
from hafrm.errors import NumericsError
from hafrm.evaluation.comparisons import response_offsets
from hafrm.process_pool import ProcessPool
from hafrm.recipe_file import dump_recipe
from hafrm.results import write_result
from hafrm.resumable import ResumableFolder
from hafrm.scoring.fused import fit_fused, fused_scores, per_token
from hafrm.scoring.scorer import ImplicitRule
from hafrm.statistics import Estimate, accuracy_interval, in_words, over_seeds
from hafrm.study.run_grid import StudyMethod, StudyPlan, StudyRun
from hafrm.study.study_result import ScorerOutcome, StudyBenchmark, StudyResult, Tuning, summarise
from hafrm.study.study_runs import (
    REWARD_MARGINS,
    TOKEN_MARGINS,
    Arrays,
    RunResult,
    RunWorker,
    StudyData,
    StudySetup,
    drop_checkpoints,
    read_run_result,
    read_scores,
    read_study_data,
)
from hafrm.training.methods import Method, get_method

log = logging.getLogger("hafrm")

COMPARISON_FILE = "comparison.json"
TWO_MODELS = "bt + dpo (fused)"
"""Two models trained apart and scored together: the control for one backbone with two heads."""

SeedScores = Mapping[tuple[str, str], Sequence[NDArray[np.float32]]]
"""Every response's score by (training set, scorer), an array for each seed."""


def compare_methods(
    plan: StudyPlan,
    out: Path,
    *,
    processes: int = 1,
    keep_models: bool = False,
    benchmarks: Sequence[str] = (),
    benchmark_data: Path | None = None,
) -> StudyResult:
    """Run what of the plan has not been run, and summarise all of it.

    Raises CheckpointError for a folder of another recipe or other test data, NumericsError if a method's
    runs diverge at every learning rate or later at the chosen one, and what `train` raises.
    """
    setup = StudySetup(plan.recipe, out, tuple(benchmarks), benchmark_data, keep_models)
    data = read_study_data(setup)  # faults of the data come to light before hours of training
    with ResumableFolder.open(out, "comparison of methods") as folder:
        recipe = plan.recipe.model_dump(mode="json")
        folder.claim(
            "runs",
            {
                **{f"recipe.{name}": section for name, section in recipe.items()},
                "test data": data.digest,
            },
            has_content=(out / "runs").is_dir(),
        )
        # for people and the report; the claim above is what counts
        atomic_write(out / "recipe.yaml", dump_recipe(plan.recipe))
        tunings, tuning_runs, runs = _train(plan, setup, processes)
        folders = dict.fromkeys(run.folder(out) for run in (*tuning_runs, *runs))
        results = [read_run_result(path) for path in folders]
        seconds = sum(done.seconds for done in results if done is not None)
        scores = scores_of_runs(runs, data, out)
        result = StudyResult(
            **vars(summarise(outcomes_of(scores, data))),
            recipe=str(out / "recipe.yaml"),
            metric=plan.recipe.evaluation.metric,
            seeds=plan.seeds,
            benchmarks=_benchmark_scores(scores, data),
            pick_longer=pick_longer(data),
            learning_rates=tunings,
            seconds=seconds,
        )
        write_result(out / COMPARISON_FILE, result)
    return result


def _train(
    plan: StudyPlan, setup: StudySetup, processes: int
) -> tuple[tuple[Tuning, ...], list[StudyRun], list[StudyRun]]:
    """Do all runs; the learning rates chosen, the runs that chose them, the runs of the result."""
    out = setup.root
    with ProcessPool(partial(RunWorker, setup), processes) as pool:
        tuning = plan.tuning_runs()
        # the number of runs does not depend on the rates
        any_rates = {method.name: plan.rates[0] for method in plan.methods}
        progress = _Progress(len(tuning) + len(plan.runs(any_rates)), processes)
        pool.run(tuning, progress)
        for _ in range(plan.num_extra_rates):
            more = _runs_beyond(plan, _choose_rates(plan, tuning, out))
            progress.total += len(more)
            pool.run(more, progress)
            tuning += more
        tunings = _choose_rates(plan, tuning, out)
        for choice in tunings:
            log.info("learning rate of %s: %.3g", choice.method, choice.chosen)
        runs = plan.runs({choice.method: choice.chosen for choice in tunings})
        pool.run(runs, progress)
    # kept until here, because a chosen run is scored from its best checkpoint
    for run in tuning:
        drop_checkpoints(run.folder(out))
    # a rate that suits the tuning set may be too high for another set or seed
    for run in runs:
        result = read_run_result(run.folder(out))
        if result is not None and result.diverged is not None:
            raise NumericsError(f"{run} diverged: {result.diverged}. Give smaller --learning-rates")
    return tunings, tuning, runs


def _choose_rates(plan: StudyPlan, runs: list[StudyRun], out: Path) -> tuple[Tuning, ...]:
    """For each method the learning rate whose best step validates best."""
    return tuple(_choose_rate(plan, method, runs, out) for method in plan.methods)


def _choose_rate(plan: StudyPlan, method: StudyMethod, runs: list[StudyRun], out: Path) -> Tuning:
    metric = plan.recipe.evaluation.metric
    sign = -1.0 if metric == "loss" else 1.0  # the highest is best
    tried: dict[float, float | None] = {}
    for run in runs:
        if run.method == method:
            result = read_run_result(run.folder(out))
            assert result is not None
            tried[run.rate] = result.validation.get(metric)
    finite = {rate: sign * value for rate, value in tried.items() if value is not None}
    if not finite:
        raise NumericsError(
            f"{method.name} diverges at every learning rate tried "
            f"({', '.join(f'{rate:.3g}' for rate in tried)}): give smaller ones with --learning-rates"
        )
    best = max(finite, key=finite.__getitem__)
    return Tuning(method.name, plan.tuning_set.name, best, tuple(sorted(tried.items())))


def _runs_beyond(plan: StudyPlan, tunings: Sequence[Tuning]) -> list[StudyRun]:
    """Runs at rates beyond those tried, of the methods whose best one is at an end of them."""
    rates = [(method, t.next_rate()) for method, t in zip(plan.methods, tunings, strict=True)]
    return [plan.tuning_run(method, rate) for method, rate in rates if rate is not None]


def scorers_of(method: StudyMethod) -> dict[str, str]:
    """The scorers of a method, and the head of each; its own score comes first."""
    name, objective = method.name, method.method
    scorers: dict[str, str] = {name: objective.scores_with}
    if objective.trains_reward and objective.trains_policy:
        scorers |= {f"{name} (implicit)": "implicit", f"{name} (fused)": "fused"}
    return scorers


def scores_of_runs(
    runs: Sequence[StudyRun], data: StudyData, out: Path
) -> dict[tuple[str, str], list[NDArray[np.float32]]]:
    """The scores of finished runs; if `bt` and `dpo` take part, also those of the two fused."""
    lengths = np.array([len(ids) for group in data.tokenized for ids in group.response_ids])
    scores: dict[tuple[str, str], list[NDArray[np.float32]]] = defaultdict(list)
    by_seed: dict[tuple[str, int], dict[str, Arrays]] = defaultdict(dict)
    for run in runs:
        stored = read_scores(run.folder(out))
        for scorer, head in scorers_of(run.method).items():
            is_fused = head == "fused"
            values = _fuse(stored, stored, run.method.method, lengths) if is_fused else stored[head]
            scores[run.train.name, scorer].append(values)
        by_seed[run.train.name, run.seed][run.method.name] = stored
    for (train, _), stored_by_method in by_seed.items():
        if {"bt", "dpo"} <= stored_by_method.keys():
            bt, dpo = stored_by_method["bt"], stored_by_method["dpo"]
            scores[train, TWO_MODELS].append(_fuse(bt, dpo, get_method("dpo"), lengths))
    return scores


def _fuse(
    reward: Arrays, policy: Arrays, method: Method, lengths: NDArray[np.int64]
) -> NDArray[np.float32]:
    """The reward of one run fused with the implicit reward of the same run or another."""
    rule = fit_fused(reward[REWARD_MARGINS], policy[TOKEN_MARGINS])
    implicit_rule = ImplicitRule(None, method.beta, method.scores_per_token)
    by_token = per_token(policy["implicit"], lengths, implicit_rule)
    return fused_scores(reward["reward"], by_token, rule)


def outcomes_of(scores: SeedScores, data: StudyData) -> dict[tuple[str, str, str], ScorerOutcome]:
    """What every scorer got right on every test set, training sets and scorers in their order."""
    decided = data.comparisons.decided()
    sets = {name: decided.take(indices) for name, indices in decided.by_source().items()}
    result = {}
    for (train, scorer), by_seed in scores.items():
        for name, comparisons in sets.items():
            margins = np.array([comparisons.margins(values) for values in by_seed])
            result[train, scorer, name] = ScorerOutcome(margins > 0, margins, comparisons.prompts)
    return result


def pick_longer(data: StudyData) -> dict[str, Estimate]:
    """The accuracy of the longer response, in characters, on each test set."""
    decided = data.comparisons.decided()
    lengths = np.array([len(text) for group in data.groups for text in group.responses], np.float32)
    margins = decided.margins(lengths)
    return {
        name: accuracy_interval(margins[indices] > 0, decided.prompts[indices])
        for name, indices in decided.by_source().items()
    }


def _benchmark_scores(scores: SeedScores, data: StudyData) -> tuple[StudyBenchmark, ...]:
    """Every scorer on every benchmark: the published score of each seed, and the mean over seeds."""
    first = response_offsets(data.groups)
    results = []
    for placed in data.benchmarks:
        benchmark, items = placed.loaded.benchmark, placed.loaded.items
        places = [first[group] + np.array(within) for group, within in placed.places]
        for (train, scorer), by_seed in scores.items():
            exact = [values.astype(np.float64) for values in by_seed]
            overall = [
                score_benchmark(benchmark, items, [v[p] for p in places]).overall for v in exact
            ]
            per_seed = tuple(estimate.value for estimate in overall)
            mean = over_seeds(overall)
            results.append(StudyBenchmark(train, scorer, benchmark.name, mean, per_seed))
    return tuple(results)


class _Progress:
    """Logs every finished run, and how long the rest may take."""

    def __init__(self, total: int, processes: int) -> None:
        self.total, self.processes = total, processes
        self.done, self.seconds = 0, 0.0

    def __call__(self, run: StudyRun, result: RunResult) -> None:
        self.done, self.seconds = self.done + 1, self.seconds + result.seconds
        left = (self.total - self.done) * self.seconds / self.done / max(1, self.processes)
        log.info(
            "run %d/%d  %s: %s  (%.0f s; about %.0f min left)",
            self.done,
            self.total,
            run,
            result.diverged or in_words(result.validation),
            result.seconds,
            left / 60,
        )
