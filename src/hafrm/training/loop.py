"""`run_training`: step, log, evaluate, save; then export what validated best.

Every number of a run follows from its recipe and data: a resumed run repeats the steps that an
uninterrupted one would have taken, bit for bit on a CPU. The test set plays no part here.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hafrm.engine.layout import lay_out
from hafrm.engine.model import HybridModel, self_check
from hafrm.errors import ConfigError, HafrmError
from hafrm.recipe import Recipe, TrackingSection
from hafrm.recipe_file import dump_recipe
from hafrm.run_folder import RunFolder
from hafrm.scoring.loading import reference_place
from hafrm.statistics import in_words, training_alarms, with_bounds
from hafrm.training import parallel
from hafrm.training.checkpoint import (
    load_checkpoint,
    load_weights,
    open_run,
    record_provenance,
    save_checkpoint,
)
from hafrm.training.memory_plan import agree_on_scatter, with_token_budget
from hafrm.training.methods import Method, resolve_method
from hafrm.training.parallel import StopSignal
from hafrm.training.passes import (
    pass_tokens,
    references_of,
    repeated_wins,
    score_heads,
    state_spread,
    validate,
)
from hafrm.training.prepared_data import PreparedData, prepare_data
from hafrm.training.run_export import export_run
from hafrm.training.setup import with_precision
from hafrm.training.sharded_start import start_model
from hafrm.training.step import (
    MEASURES,
    NonFiniteCheck,
    StepResult,
    build_optimizer,
    learning_rate,
    memory_errors,
    take_step,
)
from hafrm.training.step_batches import (
    ComparisonOrder,
    MicroBatch,
    Prefetch,
    References,
    build_micro_batch,
    plan_step,
    step_groups,
)

log = logging.getLogger("hafrm")


class StoppedError(HafrmError, RuntimeError):
    """A signal asked the run to stop; its state is saved and `--resume` continues it."""


@dataclass(frozen=True)
class TrainResult:
    """A finished run; usable as the path of its folder."""

    folder: Path
    num_steps: int
    best_step: int
    best: dict[str, float]  # validation metrics of the exported step

    def __fspath__(self) -> str:
        return str(self.folder)


def run_training(
    recipe: Recipe,
    folder: Path,
    *,
    resume: bool = False,
    data: PreparedData | None = None,
    finish: "Callable[[Job], None] | None" = None,
) -> TrainResult:
    """Train as the recipe says, in a run folder; returns once the exported models have been verified.

    `data` is what `prepare_data` makes of the recipe. `finish` is called with the job and its best weights
    instead of exporting. Raises ConfigError, DataError or ModelError before the first step; also
    CheckpointError, NumericsError, MemoryBudgetError, and StoppedError (SIGTERM or SIGINT, state saved).
    """
    ranks = parallel.start()
    recipe = with_precision(recipe, ranks.device.type)
    torch.manual_seed(recipe.training.seed)
    method = resolve_method(recipe)
    planned = with_token_budget(recipe, method, ranks)
    with open_run(recipe, folder, resume=resume) as run:
        bad = run.path / "bad_rows.jsonl" if parallel.is_main() else None
        prepared = data or prepare_data(recipe, bad)
        parallel.from_main(lambda: record_provenance(run, planned, prepared))
        model = start_model(planned, method, prepared.encoder, ranks)
        job = Job(planned, method, run, prepared, model, ranks)
        return job.train(resume, finish or export_job)


def export_job(job: "Job") -> None:
    """Export a job's models, and verify them with plain transformers."""
    if not parallel.from_main(job.run.model_path.is_dir):
        export_run(job.run, job.recipe, job.data, job.model)


class Job:
    """One run in one process."""

    def __init__(
        self,
        recipe: Recipe,
        method: Method,
        run: RunFolder,
        data: PreparedData,
        model: HybridModel,
        ranks: parallel.Ranks,
    ) -> None:
        training = recipe.training
        self.recipe, self.method, self.run, self.data = recipe, method, run, data
        self.model, self.ranks = model, ranks
        self.order = ComparisonOrder(
            data.train, per_prompt=training.comparisons_per_prompt, seed=training.seed
        )
        # as many full batches as the epochs hold, at least one
        num_batches = int(training.epochs * self.order.num_comparisons) // training.batch_size
        self.num_steps = max(1, num_batches) if training.steps is None else training.steps
        self.autocast = torch.bfloat16 if training.precision == "bf16" else None
        tokens = pass_tokens(training.token_budget)
        self._budget: Any = {"max_tokens": tokens, "autocast": self.autocast}
        self.train_references: References | None = None
        self.validation_references: References | None = None
        self.distance: Tensor | None = None  # NormBT's running mean
        self.best: dict[str, float] = {}
        self.best_step = -1

    def train(self, resume: bool, finish: "Callable[[Job], None]") -> TrainResult:
        training, command = self.recipe.training, f"hafrm train --resume {self.run.path}"
        self._check_first_batch()
        if self.method.needs_reference:
            self._load_references()
        self.wrapped = parallel.wrap(self.model, self.ranks)
        scatter = agree_on_scatter(self.model, self.ranks)
        decay, betas, eps = training.weight_decay, training.betas, training.eps
        self.optimizer = build_optimizer(self.model, weight_decay=decay, betas=betas, eps=eps)
        self.metrics = MetricsLog(self.run, self.recipe, self.num_steps)
        start = self._resume() if resume else 0
        self.nonfinite, stop = NonFiniteCheck(self.ranks.device), StopSignal()
        smaller = (
            f"{command} training.max_tokens={training.token_budget // 2} "
            "training.gradient_checkpointing=true; for a group that is too large, lower data.max_length"
        )
        batches = Prefetch(self._micro_batches)
        progress = parallel.progress_of_main("training", done=start)
        with stop, self.metrics, batches, progress as on_progress:
            for step in range(start, self.num_steps):
                rate = learning_rate(training, step, self.num_steps)
                for group in self.optimizer.param_groups:
                    group["lr"] = rate
                with memory_errors(f"step {step + 1}", smaller):
                    result = take_step(
                        self.wrapped,
                        self.optimizer,
                        batches.take(step),
                        self.method,
                        num_comparisons=training.batch_size,
                        max_grad_norm=training.max_grad_norm,
                        autocast=self.autocast,
                        nonfinite=self.nonfinite,
                        distance=self.distance,
                        scatter=scatter,
                    )
                self.distance = result.distance
                self.metrics.step(step + 1, rate, result, self.nonfinite)
                on_progress(step + 1, self.num_steps)
                due = self._is_due(step + 1, self.recipe.evaluation.every)
                improved = due and self._evaluate(step + 1)
                stopping = stop.agreed(self.ranks)
                if self._is_due(step + 1, self.recipe.checkpoint.every) or improved or stopping:
                    self.nonfinite.check()
                    self._save(step + 1)
                if stopping and step + 1 < self.num_steps:
                    raise StoppedError(
                        f"stopped by signal {stop.received} after step {step + 1} of {self.num_steps}; "
                        f"resume with: {command}"
                    )
        # A resumed run that had already finished comes straight here.
        if self.best_step != self.num_steps:
            load_weights(self.run.checkpoint_path(self.best_step), self.wrapped)
        del self.wrapped, self.optimizer, batches  # frees their memory for the export
        finish(self)
        return TrainResult(self.run.path, self.num_steps, self.best_step, self.best)

    def _micro_batches(self, step: int) -> list[MicroBatch]:
        """This rank's part of a step, in pinned memory if it goes to a GPU."""
        training, ranks, team = self.recipe.training, self.ranks, self.model.team
        refs = self.order.window(step * training.batch_size, training.batch_size)
        plan = plan_step(self.data.train, refs, training.token_budget, ranks.size // team.size)
        mine = plan[ranks.rank // team.size]
        batches = [build_micro_batch(groups, self.train_references) for groups in mine]
        if team.rank > 0:  # the first of the team counts its comparisons
            batches = [replace(batch, weights=0 * batch.weights) for batch in batches]
        if ranks.device.type == "cpu":
            return batches
        return [batch.moved(Tensor.pin_memory) for batch in batches]

    def _check_first_batch(self) -> None:
        """Compare shared prompts with plain runs, on the shortest groups of the first step."""
        refs = self.order.window(0, self.recipe.training.batch_size)
        groups = [group.tokens for group in step_groups(self.data.train, refs)]
        shortest = sorted(groups, key=lambda group: group.num_tokens)[:4]
        device, half = self.model.device, self.autocast is not None
        with torch.autocast(device.type, self.autocast, enabled=half):
            difference = self_check(self.model, lay_out(shortest).to(device))
        if self.model.sharing:
            log.info("self-check passed: shared prompts and plain runs differ by %.1e", difference)

    def _load_references(self) -> None:
        training = self.recipe.training
        self.model.eval()
        self.train_references, self.validation_references = references_of(
            self.model,
            self.data.train,
            self.order.reached(self.num_steps * training.batch_size),
            self.data.validation,
            path=reference_place(self.recipe.model),
            **self._budget,
        )
        self.model.train(training.gradient_checkpointing)  # dropout is off either way

    def _is_due(self, step: int, every: int) -> bool:
        return step == self.num_steps or (every > 0 and step % every == 0)

    def _evaluate(self, step: int) -> bool:
        """Validate; returns whether this step is the best so far."""
        self.nonfinite.check()
        groups, references = self.data.validation, self.validation_references
        logps = None if references is None else references.logps
        with state_spread(self.model) as spread:
            scores = score_heads(self.model, groups, logps, self.method, **self._budget)
        values = validate(groups, scores, self.method) | spread
        values |= repeated_wins(self.model, groups, scores, **self._budget)
        self.metrics.report("validation", step, values)
        name = self.recipe.evaluation.metric
        sign = -1.0 if name == "loss" else 1.0
        # Accuracy moves in steps of one comparison; the loss breaks its ties.
        score = (sign * values[name], -values["loss"])
        if self.best and score <= (sign * self.best[name], -self.best["loss"]):
            return False
        self.best, self.best_step = values, step
        return True

    def _save(self, step: int) -> None:
        state: dict[str, Any] = {"best_step": self.best_step, "best": self.best}
        state["interval"] = parallel.from_all(self.metrics.interval())
        if self.distance is not None:
            state["distance"] = float(self.distance)
        save_checkpoint(self.run, step, self.wrapped, self.optimizer, state)
        if parallel.is_main():
            self.run.prune(keep=self.recipe.checkpoint.keep, protect=[self.best_step])

    def _resume(self) -> int:
        folder, step = parallel.from_main(self.run.latest_checkpoint), 0
        if folder is not None:
            state: dict[str, Any] = load_checkpoint(folder, self.wrapped, self.optimizer)
            step, self.best_step, self.best = state["step"], state["best_step"], state["best"]
            if (distance := state.get("distance")) is not None:
                self.distance = torch.tensor(distance, device=self.model.device)
            self.metrics.resume(state["interval"], self.ranks)
        if parallel.is_main():
            self.run.truncate_after(step)
        log.info("resuming after step %d of %d, with its weights", step, self.num_steps)
        return step


class MetricsLog(AbstractContextManager["MetricsLog"]):
    """metrics.jsonl, trackers and the log; device values are fetched once per logging interval.

    `recipe` may also be an RLHF recipe; RLHF uses only `report`.
    """

    def __init__(self, run: RunFolder, recipe: Any, num_steps: int) -> None:
        self._run, self._recipe, self._num_steps = run, recipe, num_steps
        self._steps: list[StepResult] = []
        self._lines: list[dict[str, int | float]] = []  # of this process, to look for alarms
        self._alarmed: set[str] = set()
        self._num_resumed = 0  # of `_steps`, taken by an earlier process: their time is left out
        self._since = time.perf_counter()
        self._trackers: list[Any] = []
        if parallel.is_main():
            self._trackers = start_trackers(run.path, recipe.tracking, dump_recipe(recipe))

    def __exit__(self, *_: object) -> None:
        for tracker in self._trackers:
            tracker.finish()

    def interval(self) -> list[list[float]]:
        """This rank's steps since the last line, for a checkpoint, so that a resumed run logs the same."""
        return [[*step.sums.tolist(), float(step.grad_norm)] for step in self._steps]

    def resume(self, intervals: Sequence[list[list[float]]], ranks: parallel.Ranks) -> None:
        """Continue each rank's `interval`; if the number of ranks has changed, their sums are added up."""
        own = intervals[ranks.rank :: ranks.size]
        for i, (*sums, norm) in enumerate(intervals[0]):
            zeros = torch.zeros(len(sums), device=ranks.device)
            total = sum((zeros.new_tensor(steps[i][:-1]) for steps in own), start=zeros)
            self._steps.append(StepResult(total, zeros.new_tensor(norm), num_tokens=0))
        self._num_resumed = len(self._steps)

    def step(self, number: int, rate: float, result: StepResult, nonfinite: NonFiniteCheck) -> None:
        """Count update `number` (from 1); check and write a line when the interval is full."""
        self._steps.append(result)
        if number % self._recipe.tracking.log_every and number != self._num_steps:
            return
        nonfinite.check()
        sums = torch.stack([step.sums for step in self._steps]).sum(0)
        totals = parallel.add_up(sums)
        num_weighted = int(totals[-1])
        means = (totals[:-1] / num_weighted).tolist()
        tokens = parallel.add_up(sums.new_tensor(float(sum(s.num_tokens for s in self._steps))))
        norm = torch.stack([step.grad_norm for step in self._steps]).mean()
        seconds, num_timed = time.perf_counter() - self._since, len(self._steps) - self._num_resumed
        pairs = zip(MEASURES, means, strict=True)
        values = {name: mean for name, mean in pairs if not math.isnan(mean)}
        if not values.get("equal_rewards"):
            values.pop("equal_rewards", None)  # the usual case
        for name in ("accuracy", "implicit_accuracy"):
            if name in values:
                values |= with_bounds(name, values[name], num_weighted)
        values |= {
            "grad_norm": float(norm),
            "learning_rate": rate,
            "comparisons_per_second": num_timed * self._recipe.training.batch_size / seconds,
            "tokens_per_second": float(tokens) / seconds,
        }
        self._steps, self._num_resumed, self._since = [], 0, time.perf_counter()
        self.report("train", number, values)

    def report(self, kind: str, number: int, values: Mapping[str, float]) -> None:
        """Write one line of metrics.jsonl, the same to every tracker, and a line of the log."""
        if not parallel.is_main():
            return
        self._run.append_metrics({"step": number, "kind": kind, **values})
        for tracker in self._trackers:
            tracker.log({f"{kind}/{name}": value for name, value in values.items()}, step=number)
        log.info("step %d/%d %s: %s", number, self._num_steps, kind, in_words(values))
        if kind in ("train", "validation"):
            self._lines.append({"step": number, **values})
            warmup = self._recipe.training.warmup_fraction * self._num_steps
            for alarm, text in training_alarms(self._lines, warmup):
                if alarm not in self._alarmed:
                    log.warning("step %d: %s", number, text)
                    self._alarmed.add(alarm)


def start_trackers(folder: Path, tracking: TrackingSection, recipe_text: str) -> list[Any]:
    """accelerate's trackers, started with the recipe; raises ConfigError for a missing package."""
    if not tracking.report_to:
        return []
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers  # noqa: PLC0415

    available = {str(name) for name in get_available_trackers()}
    trackers = []
    for name in tracking.report_to:
        if name not in available:
            raise ConfigError(
                f"tracking.report_to names {name}, which is not installed: pip install 'hafrm[{name}]'"
            )
        kind = LOGGER_TYPE_TO_CLASS[name]
        directory = {"logging_dir": folder} if kind.requires_logging_directory else {}
        trackers.append(kind(tracking.project, **directory))
        trackers[-1].start()
        trackers[-1].store_init_configuration({"recipe": recipe_text})
    return trackers
