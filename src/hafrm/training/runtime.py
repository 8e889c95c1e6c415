"""What runs around the steps: batches built ahead, the learning rate, stop signals, the metrics log."""

import logging
import math
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hafrm.errors import ConfigError
from hafrm.preferences import TokenizedGroup
from hafrm.recipe import TrackingSection, TrainingSection
from hafrm.recipe_file import dump_recipe
from hafrm.run_folder import RunFolder
from hafrm.statistics import in_words, with_bounds
from hafrm.training import parallel
from hafrm.training.step import MEASURES, NonFiniteCheck, StepResult
from hafrm.training.step_batches import (
    ComparisonOrder,
    ComparisonRef,
    MicroBatch,
    References,
    build_micro_batch,
    plan_step,
    step_groups,
)

log = logging.getLogger("hafrm")


def learning_rate(training: Any, step: int, num_steps: int) -> float:
    """The rate of update `step` (from 0), a pure function, so that a resumed run needs no state of it.

    Linear warm-up from above 0 to the peak, then the schedule; the last update is one step short of 0.
    `training` is that section of a recipe, RLHF's too.
    """
    peak: float = training.learning_rate
    warmup: int = round(training.warmup_fraction * num_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    factor: float = {"cosine": cosine, "linear": 1.0 - progress, "constant": 1.0}[training.schedule]
    return peak * factor


def count_steps(training: TrainingSection, num_comparisons: int) -> int:
    """training.steps, or as many full batches as the epochs hold, at least one."""
    if training.steps is not None:
        return training.steps
    return max(1, int(training.epochs * num_comparisons) // training.batch_size)


class Prefetch:
    """This rank's micro-batches, built one step ahead in a thread; use as a context manager.

    The token budget lives here: running out of memory lowers it, which changes packing but no step.
    """

    def __init__(
        self,
        groups: Sequence[TokenizedGroup],
        order: ComparisonOrder,
        references: References | None,
        *,
        batch_size: int,
        max_tokens: int,
        ranks: parallel.Ranks,
    ) -> None:
        self.max_tokens = max_tokens
        self._groups, self._order, self._references = groups, order, references
        self._batch_size, self._ranks = batch_size, ranks
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="hafrm-prefetch")
        self._ahead: tuple[int, int, Future[list[MicroBatch]]] | None = None

    def __enter__(self) -> "Prefetch":
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.shutdown(cancel_futures=True)

    def take(self, step: int) -> list[MicroBatch]:
        """The micro-batches of `step`; a thread starts to build those of the next one."""
        if self._ahead is not None and self._ahead[:2] == (step, self.max_tokens):
            batches = self._ahead[2].result()
        else:
            batches = self._build(step, self.max_tokens)
        upcoming = self._worker.submit(self._build, step + 1, self.max_tokens)
        self._ahead = (step + 1, self.max_tokens, upcoming)
        return batches

    def halve(self, step: int) -> bool:
        """Halve the token budget; False where every micro-batch of `step` is a single group already."""
        groups = step_groups(self._groups, self._refs(step))
        if self.max_tokens <= max(group.tokens.num_tokens for group in groups):
            return False
        self.max_tokens //= 2
        return True

    def _refs(self, step: int) -> list[ComparisonRef]:
        return self._order.window(step * self._batch_size, self._batch_size)

    def _build(self, step: int, max_tokens: int) -> list[MicroBatch]:
        plan = plan_step(self._groups, self._refs(step), max_tokens, self._ranks.size)
        batches = [build_micro_batch(groups, self._references) for groups in plan[self._ranks.rank]]
        if self._ranks.device.type == "cpu":
            return batches
        return [batch.moved(Tensor.pin_memory) for batch in batches]


class StopSignal:
    """Remembers SIGTERM and SIGINT, so that a run ends its step and saves; a second one kills."""

    def __init__(self) -> None:
        self.received = ""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # Ray Train runs us in a thread, where Python delivers no signals
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._remember)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _: object) -> None:
        self.received = signal.Signals(number).name
        signal.signal(number, self._before[number])

    def agreed(self, ranks: parallel.Ranks) -> bool:
        """Whether any rank got the signal, so that all stop after the same step; waits for no device."""
        received = bool(self.received)
        return received if ranks.size == 1 else parallel.smallest(-received) < 0


class MetricsLog:
    """metrics.jsonl, trackers and the log; use as a context manager.

    Only the main rank writes. Device values are fetched once per logging interval, never inside a step.
    `recipe` may be one of RLHF, which uses `report` alone.
    """

    def __init__(self, run: RunFolder, recipe: Any, num_steps: int) -> None:
        self._run, self._recipe, self._num_steps = run, recipe, num_steps
        self._steps: list[StepResult] = []
        self._since = time.perf_counter()
        self._trackers: list[Any] = []
        if parallel.is_main():
            self._trackers = start_trackers(run.path, recipe.tracking, dump_recipe(recipe))

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        for tracker in self._trackers:
            tracker.finish()

    def step(self, number: int, rate: float, result: StepResult, nonfinite: NonFiniteCheck) -> None:
        """Count update `number` (from 1); check and write a line when the interval is full."""
        self._steps.append(result)
        if number % self._recipe.tracking.log_every == 0 or number == self._num_steps:
            nonfinite.check()
            self._flush(number, rate)

    def _flush(self, number: int, rate: float) -> None:
        comparisons = len(self._steps) * self._recipe.training.batch_size
        sums = torch.stack([step.sums for step in self._steps]).sum(0)
        means = (parallel.add_up(sums) / comparisons).tolist()
        tokens = float(sum(step.num_tokens for step in self._steps))
        total_tokens = float(parallel.add_up(sums.new_tensor(tokens)))
        norm = float(torch.stack([step.grad_norm for step in self._steps]).mean())
        seconds = time.perf_counter() - self._since
        pairs = zip(MEASURES, means, strict=True)
        values = {name: mean for name, mean in pairs if not math.isnan(mean)}
        for name in ("accuracy", "implicit_accuracy"):
            if name in values:
                values |= with_bounds(name, values[name], comparisons)
        values |= {
            "grad_norm": norm,
            "learning_rate": rate,
            "comparisons_per_second": comparisons / seconds,
            "tokens_per_second": total_tokens / seconds,
        }
        self._steps, self._since = [], time.perf_counter()
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
    """accelerate's trackers by name, started with the recipe; raises ConfigError for a missing package."""
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
        kind, project = LOGGER_TYPE_TO_CLASS[name], tracking.project
        directory = {"logging_dir": folder} if kind.requires_logging_directory else {}
        tracker = kind(project, **directory)
        tracker.start()
        tracker.store_init_configuration({"recipe": recipe_text})
        trackers.append(tracker)
    return trackers
