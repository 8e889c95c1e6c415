"""`compare_methods`: train every method on every set with every seed, and test which is better.

    OUT/recipe.yaml   runs/<training set>/<method>/rate-R-seed-S/   comparison.json

First each method's learning rate is chosen, by validation on the last training set (all of them mixed, if
there are several) with the first seed; then the runs of all sets and seeds follow. The same command
resumes; further methods, sets or seeds in the same folder run only what is new.
"""

import logging
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from hafrm.atomic import atomic_write
from hafrm.data.reader import file_digests
from hafrm.errors import NumericsError
from hafrm.evaluation.comparisons import Comparisons
from hafrm.process_pool import ProcessPool
from hafrm.recipe_file import dump_recipe
from hafrm.results import write_result
from hafrm.run_folder import ResumableFolder
from hafrm.statistics import Estimate, accuracy_interval, in_words
from hafrm.study.run_grid import StudyMethod, StudyPlan, StudyRun
from hafrm.study.study_result import Answers, StudyResult, Tuning, summarise
from hafrm.study.study_runs import (
    SCORES_FILE,
    RunResult,
    RunWorker,
    read_study_data,
)
from hafrm.training.checkpoint import model_digests

log = logging.getLogger("hafrm")

COMPARISON_FILE = "comparison.json"

SeedScores = Mapping[tuple[str, str], Sequence[NDArray[np.float32]]]
"""Every response's score by (training set, scorer), an array for each seed."""


def compare_methods(
    plan: StudyPlan, out: Path, *, processes: int = 1, keep_models: bool = False
) -> StudyResult:
    """Do the runs of the plan that are not done yet, and summarise the whole plan.

    Raises CheckpointError for a folder with another recipe or other test data, NumericsError if a method's
    runs diverge at every learning rate or at the chosen one.
    """
    data = read_study_data(plan.recipe)  # faults of the data show up before hours of training
    sections = plan.recipe.model_dump(mode="json").items()
    cache_key: dict[str, Any] = {f"recipe.{name}": section for name, section in sections}
    cache_key |= file_digests([*plan.recipe.data.train, *plan.recipe.data.validation])
    cache_key |= model_digests("model.path", plan.recipe.model.path, plan.recipe.model.revision)
    with ResumableFolder.open(out, "comparison of methods") as folder:
        has_runs = (out / "runs").is_dir()
        folder.claim("runs", {**cache_key, "test data": data.digest}, has_content=has_runs)
        # for readers and the report; what counts is the claim above
        atomic_write(out / "recipe.yaml", dump_recipe(plan.recipe))
        with ProcessPool(partial(RunWorker, plan, out, keep_models=keep_models), processes) as pool:
            tried = _run(pool, plan.tuning_runs())
            tunings = tuple(_choose_rate(plan, method, tried) for method in plan.methods)
            runs = plan.runs({tuning.method: tuning.chosen for tuning in tunings})
            results = _run(pool, runs)
        # kept until now, because a chosen run is scored from its best checkpoint
        for run in tried:
            shutil.rmtree(run.folder(out) / "checkpoints", ignore_errors=True)
        # a rate that suits the tuning set may be too high for another set or seed
        for run, done in results.items():
            if done.diverged is not None:
                raise NumericsError(f"{run}: {done.diverged}. Give smaller --learning-rates")
        result = StudyResult(
            recipe=str(out / "recipe.yaml"),
            metric=plan.recipe.evaluation.metric,
            seeds=plan.seeds,
            pick_longer=pick_longer(data.comparisons),
            learning_rates=tunings,
            seconds=sum(done.seconds for done in (tried | results).values()),
            **summarise(outcomes_of(scores_of_runs(runs, out), data.comparisons)),
        )
        write_result(out / COMPARISON_FILE, result)
    return result


def _run(
    pool: ProcessPool[StudyRun, RunResult], runs: Sequence[StudyRun]
) -> dict[StudyRun, RunResult]:
    """Do the runs, and log each finished one with its time."""

    def on_done(number: int, run: StudyRun, result: RunResult) -> None:
        outcome = result.diverged or in_words(result.validation)
        log.info(f"{number}/{len(runs)}  {run}: {outcome}  ({result.seconds:.0f} s)")

    return pool.run(runs, on_done)


def _choose_rate(
    plan: StudyPlan, method: StudyMethod, results: Mapping[StudyRun, RunResult]
) -> Tuning:
    """The learning rate that validates best."""
    metric = plan.recipe.evaluation.metric
    sign = -1.0 if metric == "loss" else 1.0  # the highest is best
    own = ((run, result) for run, result in results.items() if run.method == method)
    tried = {run.rate: result.validation.get(metric) for run, result in own}
    finite = {rate: sign * value for rate, value in tried.items() if value is not None}
    if not finite:
        rates = ", ".join(f"{rate:.3g}" for rate in tried)
        raise NumericsError(f"{method.name} diverges at {rates}: give smaller --learning-rates")
    best = max(finite, key=finite.__getitem__)
    log.info("learning rate of %s: %.3g", method.name, best)
    return Tuning(method.name, next(iter(results)).train, best, tuple(sorted(tried.items())))


def scorers_of(method: StudyMethod) -> dict[str, str]:
    """The scorers of a method, and the head of each; the method's own score comes first."""
    name, objective = method.name, method.method
    scorers: dict[str, str] = {name: objective.scores_with}
    if objective.trains_reward and objective.trains_policy:
        scorers[f"{name} (implicit)"] = "implicit"
    return scorers


def scores_of_runs(
    runs: Sequence[StudyRun], out: Path
) -> dict[tuple[str, str], list[NDArray[np.float32]]]:
    """The scores of finished runs, an array for each seed."""
    scores: dict[tuple[str, str], list[NDArray[np.float32]]] = defaultdict(list)
    for run in runs:
        stored = load_file(run.folder(out) / SCORES_FILE)
        for scorer, head in scorers_of(run.method).items():
            scores[run.train, scorer].append(stored[head])
    return scores


def outcomes_of(
    scores: SeedScores, comparisons: Comparisons
) -> dict[tuple[str, str, str], Answers]:
    """What every scorer got right on every test set; training sets and scorers keep their order."""
    decided = comparisons.decided()
    sets = {name: decided.take(indices) for name, indices in decided.by_source().items()}
    result = {}
    for (train, scorer), by_seed in scores.items():
        for name, pairs in sets.items():
            margins = np.array([pairs.margins(values) for values in by_seed])
            result[train, scorer, name] = margins, pairs.prompts
    return result


def pick_longer(comparisons: Comparisons) -> dict[str, Estimate]:
    """The accuracy of picking the longer response, in characters, on each test set."""
    decided = comparisons.decided()
    chosen, rejected = decided.lengths
    right = chosen > rejected
    return {
        name: accuracy_interval(right[indices], decided.prompts[indices])
        for name, indices in decided.by_source().items()
    }
