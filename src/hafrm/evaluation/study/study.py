"""`compare_methods`: train every method on every set with every seed, and say which is better, if any.

    OUT/recipe.yaml   cells/<training set>/<method>/rate-R-seed-S/   comparison.json

First each method's learning rate is chosen, by validation on the last training set (all of them mixed,
where there are several) with the first seed; then the cells are run. A comparison that was killed goes on
where it was; further methods, sets or seeds in the same folder run only what is new.
"""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hafrm.atomic import atomic_write
from hafrm.errors import CheckpointError, NumericsError
from hafrm.evaluation.metrics import ScoredComparisons, pairwise_accuracy, plain
from hafrm.evaluation.study.benchmarks import BenchmarkCell, benchmark_cells
from hafrm.evaluation.study.cell import CellResult, CellRunner, Setting, read_result, read_test_sets
from hafrm.evaluation.study.outcomes import outcomes_of, pick_longer, row_scores
from hafrm.evaluation.study.plan import Cell, StudyPlan
from hafrm.evaluation.study.summary import Summary, summarise
from hafrm.process_pool import ProcessPool
from hafrm.recipe import Recipe
from hafrm.recipe_file import dump_recipe, load_recipe
from hafrm.scoring.forward import first_responses
from hafrm.statistics import Estimate, in_words

log = logging.getLogger("hafrm")

RESULT = "comparison.json"


@dataclass(frozen=True)
class Tuning:
    """How a method's learning rate was chosen."""

    method: str
    train: str
    """The training set whose validation part decided."""
    chosen: float
    tried: dict[float, float | None]
    """The deciding validation metric of each rate; None where the run diverged."""

    def beyond(self) -> float | None:
        """The rate to try next where the best lies at the end of those tried, which is no optimum."""
        rates = sorted(self.tried)
        if len(rates) < 2 or self.chosen not in (rates[0], rates[-1]):
            return None
        if self.chosen == rates[0]:
            return rates[0] ** 2 / rates[1]
        return rates[-1] ** 2 / rates[-2]


@dataclass(frozen=True)
class Study:
    """A finished comparison."""

    folder: Path
    plan: StudyPlan
    tunings: tuple[Tuning, ...]
    summary: Summary
    benchmarks: tuple[BenchmarkCell, ...]
    pick_longer: dict[str, Estimate]
    """Accuracy of the longer response on each test set."""
    seconds: float
    """Of all cells, as far as their last process ran them."""

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        baselines = [{"test": k, "pick_longer": asdict(v)} for k, v in self.pick_longer.items()]
        tunings = [
            {**asdict(each), "tried": [list(pair) for pair in each.tried.items()]}
            for each in self.tunings
        ]
        result: dict[str, Any] = plain(
            {
                "recipe": str(self.folder / "recipe.yaml"),
                "seeds": list(self.plan.seeds),
                **self.summary.to_dict(),
                "benchmarks": [asdict(each) for each in self.benchmarks],
                "baselines": baselines,
                "learning_rates": tunings,
                "seconds": self.seconds,
            }
        )
        return result


def compare_methods(
    plan: StudyPlan,
    out: Path,
    *,
    processes: int = 1,
    keep_models: bool = False,
    benchmarks: Sequence[str] = (),
    benchmark_data: Path | None = None,
) -> Study:
    """Run what of the plan has not been run, and summarise all of it.

    Raises CheckpointError for a folder of another recipe, NumericsError where a method's runs diverge at
    every learning rate or later at the chosen one, and what `train` raises.
    """
    _open(out, plan.recipe)
    setting = Setting(plan.recipe, out, tuple(benchmarks), benchmark_data, keep_models)
    sets = read_test_sets(setting)  # what is wrong there should be known before hours of training
    with ProcessPool(partial(CellRunner, setting), processes) as pool:
        tuning = plan.tuning_cells()
        total = len(tuning) + len(set(plan.cells(_first_rates(plan))) - set(tuning))
        progress = _Progress(total, processes)
        pool.run(tuning, progress)
        for _ in range(plan.widenings):
            wider = _beyond(plan, tuning, out)
            progress.total += len(wider)
            pool.run(wider, progress)
            tuning += wider
        tunings = _choices(plan, tuning, out)
        rates = {each.method: each.chosen for each in tunings}
        for each in tunings:
            log.info("learning rate of %s: %.3g", each.method, each.chosen)
        cells = plan.cells(rates)
        pool.run([cell for cell in cells if cell not in tuning], progress)
    _refuse_diverged(cells, out)
    results = [read_result(cell.folder(out)) for cell in {*tuning, *cells}]
    scores = row_scores(plan, rates, sets, out)
    study = Study(
        out,
        plan,
        tunings,
        summarise(outcomes_of(scores, sets)),
        benchmark_cells(sets.benchmarks, scores, first_responses(sets.encoded)),
        {name: _pick_longer(each) for name, each in pick_longer(sets).items()},
        sum(each.seconds for each in results if each is not None),
    )
    atomic_write(out / RESULT, json.dumps(study.to_dict(), indent=1) + "\n")
    return study


def _open(out: Path, recipe: Recipe) -> None:
    """The folder of a comparison, new or of the same recipe."""
    file = out / "recipe.yaml"
    if not file.is_file():
        if out.is_dir() and any(out.iterdir()):
            raise CheckpointError(f"{out} is not empty and no comparison: give another --out")
        out.mkdir(parents=True, exist_ok=True)
        atomic_write(file, dump_recipe(recipe))
    elif load_recipe(file) != recipe:
        raise CheckpointError(
            f"{out} holds a comparison with another recipe ({file}); give another --out, or go on with "
            "that recipe (methods, seeds and learning rates may be added)"
        )


def _pick_longer(scored: ScoredComparisons) -> Estimate:
    decided = ~scored.ties
    return pairwise_accuracy(scored.margins[decided], scored.prompts[decided]).estimate


def _first_rates(plan: StudyPlan) -> Mapping[str, float]:
    return {entrant.name: plan.rates[0] for entrant in plan.entrants}


def _choices(plan: StudyPlan, tuning: list[Cell], out: Path) -> tuple[Tuning, ...]:
    return tuple(_choose(plan, entrant.name, tuning, out) for entrant in plan.entrants)


def _beyond(plan: StudyPlan, tuning: list[Cell], out: Path) -> list[Cell]:
    """Runs at rates beyond those tried, of the methods that did best at an end of them."""
    found = zip(plan.entrants, _choices(plan, tuning, out), strict=True)
    return [
        plan.tuning_cell(entrant, rate)
        for entrant, each in found
        if (rate := each.beyond()) is not None
    ]


def _choose(plan: StudyPlan, method: str, cells: list[Cell], out: Path) -> Tuning:
    """The learning rate whose best step validates best."""
    metric = plan.recipe.evaluation.metric
    tried: dict[float, float | None] = {}
    for cell in cells:
        if cell.entrant.name == method:
            result = read_result(cell.folder(out))
            assert result is not None
            tried[cell.rate] = result.validation.get(metric)
    sign = -1.0 if metric == "loss" else 1.0
    known = {rate: sign * value for rate, value in tried.items() if value is not None}
    if not known:
        raise NumericsError(
            f"{method} diverges at every learning rate tried ({', '.join(f'{r:.3g}' for r in tried)}): "
            "give smaller ones with --learning-rates"
        )
    best = max(known, key=known.__getitem__)
    return Tuning(method, plan.tuning_set.name, best, dict(sorted(tried.items())))


def _refuse_diverged(cells: list[Cell], out: Path) -> None:
    for cell in cells:
        result = read_result(cell.folder(out))
        if result is not None and result.diverged is not None:
            raise NumericsError(
                f"{cell} diverged: {result.diverged}. Give smaller --learning-rates"
            )


class _Progress:
    """Tells of every finished cell, and how long the rest may take."""

    def __init__(self, total: int, processes: int) -> None:
        self.total, self.processes = total, processes
        self.done = 0
        self.began = time.monotonic()
        self.ran: list[float] = []

    def __call__(self, cell: Cell, result: CellResult) -> None:
        self.done += 1
        if result.seconds < time.monotonic() - self.began:  # run now, not found done
            self.ran.append(result.seconds)
        left = self.total - self.done
        per_cell = sum(self.ran) / len(self.ran) if self.ran else result.seconds
        log.info(
            "cell %d/%d  %s: %s  (%.0f s; about %.0f min left)",
            self.done,
            self.total,
            cell,
            result.diverged or in_words(result.validation),
            result.seconds,
            left * per_cell / max(1, self.processes) / 60,
        )
