"""What people see of a run: metrics.jsonl, trackers, a progress bar with ETA on a terminal.

Only the main rank writes. Device values are fetched once per logging interval and never inside a step.
"""

import logging
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from hafrm.errors import ConfigError
from hafrm.recipe import Recipe, TrackingSection
from hafrm.recipe_file import dump_recipe
from hafrm.run_folder import RunFolder
from hafrm.statistics import in_words, with_bounds
from hafrm.training import parallel
from hafrm.training.guard import Guard
from hafrm.training.step import MEASURES, StepResult

log = logging.getLogger("hafrm")


class Watch:
    """Collects steps and reports every `log_every` of them; use as a context manager."""

    def __init__(self, run: RunFolder, recipe: Recipe, num_steps: int, done: int) -> None:
        self._run, self._recipe = run, recipe
        self._num_steps = num_steps
        self._steps: list[StepResult] = []
        self._since = time.perf_counter()
        self._trackers = (
            start_trackers(run.path, recipe.tracking, dump_recipe(recipe))
            if parallel.is_main()
            else []
        )
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
            disable=not (parallel.is_main() and sys.stderr.isatty()),
        )
        self._task = self._bar.add_task("training", total=num_steps, completed=done, note="")

    def __enter__(self) -> "Watch":
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()
        for tracker in self._trackers:
            tracker.finish()

    def step(self, number: int, rate: float, result: StepResult, guard: Guard) -> None:
        """Note update `number` (from 1); check and write a line of metrics when the interval is full."""
        self._steps.append(result)
        self._bar.update(self._task, completed=number)
        if number % self._recipe.tracking.log_every == 0 or number == self._num_steps:
            guard.check()
            self._flush(number, rate)

    def _flush(self, number: int, rate: float) -> None:
        comparisons = len(self._steps) * self._recipe.training.batch_size
        tokens = torch.tensor(float(sum(step.num_tokens for step in self._steps)))
        sums = torch.stack([step.sums for step in self._steps]).sum(0)
        means = (parallel.add_up(sums) / comparisons).tolist()
        total_tokens = float(parallel.add_up(tokens.to(sums.device)))
        norm = float(torch.stack([step.grad_norm for step in self._steps]).mean())
        seconds = time.perf_counter() - self._since
        values = {name: v for name, v in zip(MEASURES, means, strict=True) if v == v}  # noqa: PLR0124
        for name in ("accuracy", "implicit_accuracy"):
            if name in values:
                values |= with_bounds(name, values[name], comparisons)
        values |= {
            "grad_norm": norm,
            "learning_rate": rate,
            "comparisons_per_second": comparisons / seconds,
            "tokens_per_second": total_tokens / seconds,
        }
        alphas = [step.alpha for step in self._steps if step.alpha is not None]
        if alphas:
            values["alpha"] = float(torch.stack(alphas).mean())
        self._steps, self._since = [], time.perf_counter()
        self._bar.update(
            self._task,
            note=f"loss {values['loss']:.4f}  {values['comparisons_per_second']:.1f} comparisons/s  "
            f"{values['tokens_per_second']:.0f} tokens/s",
        )
        self.report("train", number, values)

    def report(self, kind: str, number: int, values: Mapping[str, float]) -> None:
        """One line of metrics.jsonl, the same to every tracker, and a line of log."""
        if not parallel.is_main():
            return
        self._run.append_metrics({"step": number, "kind": kind, **values})
        for tracker in self._trackers:
            tracker.log({f"{kind}/{name}": value for name, value in values.items()}, step=number)
        log.info("step %d/%d %s: %s", number, self._num_steps, kind, in_words(values))


def start_trackers(folder: Path, tracking: TrackingSection, recipe_text: str) -> list[Any]:
    """accelerate's trackers by name, told the recipe; raises ConfigError for one that is not installed."""
    if not tracking.report_to:
        return []
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers  # noqa: PLC0415

    trackers = []
    available = {str(name) for name in get_available_trackers()}
    for name in tracking.report_to:
        if name not in available:
            raise ConfigError(
                f"tracking.report_to names {name}, which is not installed: pip install 'hafrm[{name}]'"
            )
        kind = LOGGER_TYPE_TO_CLASS[name]
        project = tracking.project
        tracker = (
            kind(project, logging_dir=folder) if kind.requires_logging_directory else kind(project)
        )
        tracker.start()
        tracker.store_init_configuration({"recipe": recipe_text})
        trackers.append(tracker)
    return trackers
