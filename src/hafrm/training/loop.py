"""`train`: the loop, top to bottom: step, log, evaluate, save; then export what validated best.

Every number of a run follows from its recipe and data: a resumed run repeats the steps that an
uninterrupted one would have taken, bit for bit on a CPU. The test set plays no part here.
"""

import logging
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hafrm.config import dump_recipe
from hafrm.data.sources import local_files
from hafrm.engine.layout import lay_out
from hafrm.engine.model import HybridModel, self_check
from hafrm.errors import CheckpointError, HafrmError
from hafrm.recipe import Recipe
from hafrm.runs import RunFolder, fingerprint
from hafrm.training import parallel
from hafrm.training.batches import ComparisonOrder, MicroBatch, References, build, plan_step
from hafrm.training.checkpoint import load_checkpoint, load_weights, save_checkpoint
from hafrm.training.finish import export_run
from hafrm.training.methods import Method, get_method
from hafrm.training.prepare import PreparedData, build_model, prepare_data
from hafrm.training.reference import reference_logps
from hafrm.training.schedule import count_steps, learning_rate
from hafrm.training.step import build_optimizer, take_step
from hafrm.training.validation import validate
from hafrm.training.watch import Watch

log = logging.getLogger("hafrm")


class StoppedError(HafrmError, RuntimeError):
    """A signal asked the run to stop; its state is saved and `--resume` goes on."""


@dataclass(frozen=True)
class TrainResult:
    """What a finished run is."""

    folder: Path
    num_steps: int
    best_step: int
    best: dict[str, float]
    """Validation metrics of the exported step."""


def train(recipe: Recipe, folder: Path, *, resume: bool = False) -> TrainResult:
    """Train as the recipe says, in a run folder; returns once the exported models have been verified.

    Raises ConfigError, DataError or ModelError before the first step; NumericsError for numbers that
    must not be built upon; CheckpointError for a folder that cannot be resumed; StoppedError after a
    SIGTERM or SIGINT, when the state has been saved.
    """
    ranks = parallel.start()
    torch.manual_seed(recipe.training.seed)
    method = resolve_method(recipe)
    run = open_run(recipe, folder, resume=resume)
    with run.lock() if ranks.is_main else _nothing():
        data = prepare_data(recipe, run.path / "bad_rows.jsonl" if ranks.is_main else None)
        if ranks.is_main:
            _record_provenance(run, recipe, data)
        model = build_model(recipe, method, data.encoder, ranks.device)
        job = Job(recipe, method, run, data, model)
        return job.train(ranks, resume=resume)


def resolve_method(recipe: Recipe) -> Method:
    """The recipe's method with its overrides; raises ConfigError for one that is not understood."""
    section = recipe.method.model_dump()
    return get_method(section.pop("name"), **section)


def open_run(recipe: Recipe, folder: Path, *, resume: bool) -> RunFolder:
    """The run's folder: made by the main rank, or opened; raises CheckpointError where that is unsafe."""
    text = dump_recipe(recipe)
    if resume:
        run = RunFolder.open(folder)
        if run.recipe_text() != text:
            raise CheckpointError(
                f"the recipe differs from the one that {folder} was started with; resume with "
                f"{folder / 'recipe.yaml'}, or start a new folder"
            )
        return run
    if parallel.is_main():
        RunFolder.create(folder, text)
    parallel.wait()
    return RunFolder.open(folder)


def _record_provenance(run: RunFolder, recipe: Recipe, data: PreparedData) -> None:
    """Versions, seed, digests of local data files, and what became of the rows."""
    entries = [*recipe.data.train, *recipe.data.validation, *recipe.data.test]
    files = {file for entry in entries for file in local_files(entry)}
    digests = {str(file): fingerprint(file) for file in sorted(files) if file.is_file()}
    details = {"counts": data.counts, "template_sha256": data.encoder.template_sha256}
    run.record_provenance(seed=recipe.training.seed, data=digests, details=details)


class Job:
    """One run in one process: what stays the same from step to step."""

    def __init__(
        self, recipe: Recipe, method: Method, run: RunFolder, data: PreparedData, model: HybridModel
    ) -> None:
        self.recipe, self.method, self.run, self.data = recipe, method, run, data
        self.order = ComparisonOrder(
            data.train,
            per_prompt=recipe.training.comparisons_per_prompt,
            seed=recipe.training.seed,
        )
        self.num_steps = count_steps(recipe.training, self.order.num_comparisons)
        self.autocast = torch.bfloat16 if recipe.training.precision == "bf16" else None
        self.train_references: References | None = None
        self.validation_references: References | None = None
        self.model = model
        self.best: dict[str, float] = {}
        self.best_step = -1

    def train(self, ranks: parallel.Ranks, *, resume: bool) -> TrainResult:
        """The run from wherever it stands to its exported models."""
        training = self.recipe.training
        self._check_first_batch()
        if self.method.needs_reference:
            self._load_references()
        wrapped = parallel.wrap(self.model, training.parallel, self.autocast)
        optimizer = build_optimizer(
            self.model, weight_decay=training.weight_decay, betas=training.betas, eps=training.eps
        )
        start = self._resume(wrapped, optimizer) if resume else 0
        stop = _StopSignal()
        with (
            stop,
            Watch(self.run, self.recipe, self.num_steps, start) as watch,
            ThreadPoolExecutor(1) as ahead,
        ):
            upcoming = ahead.submit(self.batches, start, ranks)
            for step in range(start, self.num_steps):
                batches = upcoming.result()
                upcoming = ahead.submit(self.batches, step + 1, ranks)
                rate = learning_rate(training, step, self.num_steps)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                result = take_step(
                    wrapped,
                    optimizer,
                    batches,
                    self.method,
                    num_comparisons=training.batch_size,
                    max_grad_norm=training.max_grad_norm,
                    autocast=self.autocast,
                )
                watch.step(step + 1, rate, result)
                improved = self._is_due(step + 1, self.recipe.evaluation.every) and self._evaluate(
                    step + 1, wrapped, watch
                )
                stopping = stop.agreed(ranks)
                due = self._is_due(step + 1, self.recipe.checkpoint.every)
                if due or improved or stopping:
                    self._save(step + 1, wrapped, optimizer)
                if stopping and step + 1 < self.num_steps:
                    raise StoppedError(
                        f"stopped by signal {stop.received} after step {step + 1} of {self.num_steps}; "
                        f"go on with: hafrm train --resume {self.run.path}"
                    )
        return self._finish(wrapped)

    def batches(self, step: int, ranks: parallel.Ranks) -> list[MicroBatch]:
        """This rank's micro-batches of a step; empty past the end."""
        if step >= self.num_steps:
            return []
        training = self.recipe.training
        picks = self.order.window(step * training.batch_size, training.batch_size)
        plan = plan_step(self.data.train, picks, training.max_tokens, ranks.size)
        return [build(parts, self.train_references) for parts in plan[ranks.rank]]

    def _check_first_batch(self) -> None:
        """Shared against plain on the shortest groups of the first step, a few thousand tokens."""
        picks = self.order.window(0, self.recipe.training.batch_size)
        plan = plan_step(self.data.train, picks, self.recipe.training.max_tokens)
        parts = sorted((part for batch in plan[0] for part in batch), key=lambda p: p.num_tokens)
        layout = lay_out(parts[:4]).to(self.model.device)
        with torch.autocast(
            layout.input_ids.device.type, self.autocast, enabled=self.autocast is not None
        ):
            found = self_check(self.model, layout)
        if self.model.sharing:
            log.info("shared prompts agree with plain runs: %s", found)

    def _load_references(self) -> None:
        groups = [*self.data.train, *self.data.validation]
        training = self.recipe.training
        log.info("reference log-probs of %d groups", len(groups))
        self.model.eval()
        both = reference_logps(
            self.model, groups, max_tokens=4 * training.max_tokens, autocast=self.autocast
        )
        if training.gradient_checkpointing:
            self.model.train()
        cut = len(self.data.train)
        split = both.first[cut]
        self.train_references = References(both.logps[:split], both.first[:cut])
        self.validation_references = References(both.logps[split:], both.first[cut:] - split)

    def _is_due(self, step: int, every: int) -> bool:
        return step == self.num_steps or (every > 0 and step % every == 0)

    def _evaluate(self, step: int, wrapped: nn.Module, watch: Watch) -> bool:
        """Validate; True where this step is the best so far."""
        metrics = validate(
            parallel.unwrap(wrapped),
            self.data.validation,
            self.validation_references,
            self.method,
            max_tokens=2 * self.recipe.training.max_tokens,
            autocast=self.autocast,
        )
        watch.report("validation", step, metrics)
        sign = -1.0 if self.recipe.evaluation.metric == "loss" else 1.0
        name = self.recipe.evaluation.metric
        # A tie on accuracy, which moves in steps of one comparison, is decided by the loss.
        score = (sign * metrics[name], -metrics["loss"])
        if self.best and score <= (sign * self.best[name], -self.best["loss"]):
            return False
        self.best, self.best_step = metrics, step
        return True

    def _save(self, step: int, wrapped: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        state = {"best_step": self.best_step, "best": self.best}
        save_checkpoint(self.run, step, wrapped, optimizer, state)
        if parallel.is_main():
            self.run.prune(keep=self.recipe.checkpoint.keep, protect=[self.best_step])

    def _resume(self, wrapped: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        folder = self.run.latest_checkpoint()
        step = 0
        if folder is not None:
            state: dict[str, Any] = load_checkpoint(folder, wrapped, optimizer)
            step, self.best_step, self.best = state["step"], state["best_step"], state["best"]
        if parallel.is_main():
            self.run.truncate_after(step)
        log.info("resuming after step %d of %d", step, self.num_steps)
        return step

    def _finish(self, wrapped: nn.Module) -> TrainResult:
        """Export and verify the best step, once; a resumed run that had finished finds it done."""
        if self.best_step != self.num_steps:
            load_weights(self.run.checkpoint_path(self.best_step), wrapped)
        export_run(self.run, self.recipe, self.method, self.data, parallel.unwrap(wrapped))
        return TrainResult(self.run.path, self.num_steps, self.best_step, self.best)


class _StopSignal:
    """Remembers SIGTERM and SIGINT instead of dying in the middle of a step; a second one kills."""

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
        """Whether any rank was told to stop, so that all stop after the same step."""
        flag = torch.tensor(float(bool(self.received)), device=ranks.device)
        return bool(self.received) if ranks.size == 1 else float(parallel.add_up(flag)) > 0


@contextmanager
def _nothing() -> Iterator[None]:
    yield
