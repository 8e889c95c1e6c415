"""One cell of a study: train it, score the test sets with its best weights, keep the scores.

Scores come from the model in memory: a study of sixty runs neither exports nor reloads sixty models. What
stays is a folder with the run's recipe and metrics, `scores.safetensors` and, last, `result.json`: a cell
that has one is finished, and one that was killed is resumed. A run that only helps to choose a learning
rate keeps its checkpoints until the choice is made, and scores nothing.
"""

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save

from hafrm.atomic import atomic_write
from hafrm.data.encoding import EncodedGroup, Encoder
from hafrm.data.encoding_cache import encode_cached
from hafrm.data.groups import Group
from hafrm.errors import NumericsError
from hafrm.evaluation.diagnostics.representation import representation
from hafrm.evaluation.evaluate import read_comparisons
from hafrm.evaluation.study.benchmarks import Placed, place_benchmarks
from hafrm.evaluation.study.plan import Cell
from hafrm.recipe import Recipe
from hafrm.scoring.states import last_states
from hafrm.training import parallel
from hafrm.training.budget import with_token_budget
from hafrm.training.loop import Job, export_job, train
from hafrm.training.methods import get_method
from hafrm.training.prepare import PreparedData, build_model, load_tokenizer, prepare_data
from hafrm.training.reference import REFERENCE_TOKENS, reference_logps
from hafrm.training.start import with_precision
from hafrm.training.validation import HeadScores, decided_margins, score_heads

RESULT, SCORES = "result.json", "scores.safetensors"
REWARD_MARGINS, TOKEN_MARGINS = "validation_reward", "validation_implicit_per_token"
"""Margins on validation data, which alone decide how the fused score weighs the two heads."""
NUM_STATES = 256
"""Responses whose last-token states are looked at."""


@dataclass(frozen=True)
class CellResult:
    """What a finished cell found."""

    validation: dict[str, float]
    """Of the best step; empty where the run diverged."""
    best_step: int
    num_steps: int
    seconds: float
    """Of the process that finished it; a resumed cell counts its last part only."""
    diverged: str | None = None
    """The error of a run whose loss or gradient was not finite."""
    scored: bool = True
    """Whether the test sets were scored."""
    representation: dict[str, float] = field(default_factory=dict)
    """Of the last-token states of the first test responses: `effective_rank`, `top_share`, `mean_cosine`,
    and mean and standard deviation of their norms."""


@dataclass(frozen=True)
class Setting:
    """What all cells of a study have in common."""

    recipe: Recipe
    root: Path
    benchmarks: tuple[str, ...] = ()
    """Published benchmarks to score besides the recipe's test sets."""
    benchmark_data: Path | None = None
    """The folder with their files; None: from the hub."""
    keep_models: bool = False
    """Export every cell's models."""


@dataclass(frozen=True)
class TestSets:
    """The held-out data of a study, encoded as its models see them."""

    groups: list[Group]
    """Those with comparisons, then the candidates of benchmarks."""
    encoded: list[EncodedGroup]
    benchmarks: tuple[Placed, ...] = ()


def read_test_sets(setting: Setting) -> TestSets:
    """The study's test sets and benchmarks, the same for all its cells.

    Raises DataError for a set without comparisons, and what `place_benchmarks` raises.
    """
    data = setting.recipe.data
    _, groups = read_comparisons(data.test, data.max_bad_fraction)
    candidates, placed = place_benchmarks(
        setting.benchmarks, setting.benchmark_data, first=len(groups)
    )
    encoder = Encoder(
        load_tokenizer(setting.recipe.model),
        max_length=data.max_length,
        max_prompt_length=data.max_prompt_length,
        too_long="cut",
    )
    groups += candidates
    return TestSets(groups, encode_cached(encoder, groups)[0], placed)


def read_result(folder: Path) -> CellResult | None:
    """What a cell found, or None where it has not finished."""
    file = folder / RESULT
    return CellResult(**json.loads(file.read_text())) if file.is_file() else None


def read_scores(folder: Path) -> dict[str, NDArray[np.float32]]:
    """A finished cell's scores of every response of the test sets, by head, and its validation margins."""
    return load_file(folder / SCORES)


class CellRunner:
    """Runs cells of one study in this process; what several cells need is prepared once."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.sets = read_test_sets(setting)
        self._references: NDArray[np.float32] | None = None
        self._prepared: tuple[str, PreparedData] | None = None

    def __call__(self, cell: Cell) -> CellResult:
        """Train a cell and score it, from wherever it stands, or read its result.

        A run that diverges is a result, of its learning rate. Raises what else `train` raises, such as
        CheckpointError for a folder that another recipe was run in.
        """
        folder, recipe = cell.folder(self.setting.root), cell.recipe(self.setting.recipe)
        before = read_result(folder)
        if before is not None and (before.scored or before.diverged or not cell.scored):
            return before
        began = time.monotonic() - (0.0 if before is None else before.seconds)
        states: dict[str, float] = {}

        def finish(job: Job) -> None:
            if not cell.scored:
                return
            self._score(job, folder)
            states.update(self._representation(job))
            if self.setting.keep_models:
                export_job(job)

        resume = (folder / "recipe.yaml").is_file()
        try:
            done = train(
                recipe, folder, resume=resume, data=self._data_of(cell, recipe), finish=finish
            )
            seconds = time.monotonic() - began
            result = CellResult(
                done.best,
                done.best_step,
                done.num_steps,
                seconds,
                scored=cell.scored,
                representation=states,
            )
        except NumericsError as error:
            result = CellResult({}, -1, 0, time.monotonic() - began, diverged=str(error))
        if result.scored:
            drop_checkpoints(folder)
        folder.mkdir(parents=True, exist_ok=True)  # a run may diverge before it has one
        atomic_write(folder / RESULT, json.dumps(asdict(result), indent=1) + "\n")
        return result

    def _data_of(self, cell: Cell, recipe: Recipe) -> PreparedData:
        """Methods with one seed on one set train on the very same data."""
        key = f"{cell.train.name} {cell.seed}"
        if self._prepared is None or self._prepared[0] != key:
            self._prepared = (key, prepare_data(recipe))
        return self._prepared[1]

    def _references_of_tests(self) -> NDArray[np.float32]:
        """The starting checkpoint's log-probs of the test sets: from the cache but for the first time."""
        if self._references is None:
            method = get_method("dpo")
            ranks = parallel.start()
            recipe = with_precision(self.setting.recipe, ranks.device.type)
            recipe = with_token_budget(recipe, method, ranks)
            encoder = Encoder(load_tokenizer(recipe.model), max_length=recipe.data.max_length)
            self._references = reference_logps(
                build_model(recipe, method, encoder, ranks.device).eval(),
                self.sets.encoded,
                max_tokens=REFERENCE_TOKENS * recipe.training.token_budget,
                autocast=torch.bfloat16 if recipe.training.precision == "bf16" else None,
                path=recipe.model.path,
            ).logps
        return self._references

    def _score(self, job: Job, folder: Path) -> None:
        """Keep the scores of the test sets, and the margins on validation data that a fused score is
        fitted on: of both heads of one run, or of one head each of two runs."""
        scores = _heads(
            job,
            self.sets.encoded,
            self._references_of_tests() if job.method.needs_reference else None,
        )
        stored = {"reward": scores.rewards, "implicit": scores.implicit}
        groups, references = job.data.validation, job.validation_references
        held_out = _heads(job, groups, None if references is None else references.logps)
        for name, values in (
            (REWARD_MARGINS, held_out.rewards),
            (TOKEN_MARGINS, held_out.implicit_per_token),
        ):
            if values is not None:
                stored[name] = decided_margins(groups, values, held_out.first).astype(np.float32)
        atomic_write(folder / SCORES, save({k: v for k, v in stored.items() if v is not None}))

    def _representation(self, job: Job) -> dict[str, float]:
        """How spread out the states are that rewards are read from, on the same texts for all cells."""
        first: list[EncodedGroup] = []
        for group in self.sets.encoded:
            if sum(len(g.response_ids) for g in first) >= NUM_STATES:
                break
            first.append(group)
        training = job.model.training
        job.model.eval()
        states = last_states(job.model, first)
        job.model.train(training)
        result = representation(states)
        norms = np.linalg.norm(states, axis=1)
        return {
            "effective_rank": result.effective_rank,
            "top_share": result.top_share,
            "mean_cosine": result.mean_cosine,
            "norm_mean": float(norms.mean()),
            "norm_std": float(norms.std()),
        }


def drop_checkpoints(folder: Path) -> None:
    """Free the space of a cell that needs its weights no longer."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def _heads(
    job: Job, groups: Sequence[EncodedGroup], references: NDArray[np.float32] | None
) -> HeadScores:
    return score_heads(
        job.model,
        groups,
        references,
        job.method,
        max_tokens=2 * job.recipe.training.token_budget,
        autocast=job.autocast,
    )
