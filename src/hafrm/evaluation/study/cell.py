"""One cell of a study: train it, score the test sets with its best weights, keep the scores.

Scores come from the model in memory: a study of sixty runs neither exports nor reloads sixty models. What
stays is a folder with the run's recipe and metrics, `scores.safetensors` and, last, `result.json`: a cell
that has one is finished, and one that was killed is resumed.
"""

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save

from hafrm.atomic import atomic_write
from hafrm.data.encoding import Encoder, encode_cached
from hafrm.errors import NumericsError
from hafrm.evaluation.evaluate import read_comparisons
from hafrm.evaluation.study.benchmarks import Placed, place_benchmarks
from hafrm.evaluation.study.plan import Cell
from hafrm.preferences import Group, TokenizedGroup
from hafrm.recipe import Recipe
from hafrm.training import parallel
from hafrm.training.budget import with_token_budget
from hafrm.training.loop import Job, export_job, resolve_method, train
from hafrm.training.methods import get_method
from hafrm.training.prepare import PreparedData, build_model, load_tokenizer, prepare_data
from hafrm.training.reference import REFERENCE_TOKENS, reference_logps
from hafrm.training.validation import HeadScores, decided_margins, score_heads

RESULT, SCORES = "result.json", "scores.safetensors"
REWARD_MARGINS, TOKEN_MARGINS = "validation_reward", "validation_implicit_per_token"
"""Margins on validation data, which alone decide how the fused score weighs the two heads."""


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
    encoded: list[TokenizedGroup]
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
        """Train and score a cell, go on with it where it was killed, or read what it found before.

        A run that diverges is a result, of its learning rate. Raises what else `train` raises, such as
        CheckpointError for a folder that another recipe was run in.
        """
        folder, recipe = cell.folder(self.setting.root), cell.recipe(self.setting.recipe)
        if (result := read_result(folder)) is not None:
            return result
        began = time.monotonic()
        references = self._references_of_tests() if resolve_method(recipe).needs_reference else None

        def finish(job: Job) -> None:
            self._score(job, references, folder)
            if self.setting.keep_models:
                export_job(job)

        resume = (folder / "recipe.yaml").is_file()
        try:
            done = train(
                recipe, folder, resume=resume, data=self._data_of(cell, recipe), finish=finish
            )
            seconds = time.monotonic() - began
            result = CellResult(done.best, done.best_step, done.num_steps, seconds)
        except NumericsError as error:
            result = CellResult({}, -1, 0, time.monotonic() - began, diverged=str(error))
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
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
            recipe = with_token_budget(self.setting.recipe, method, ranks)
            encoder = Encoder(load_tokenizer(recipe.model), max_length=recipe.data.max_length)
            self._references = reference_logps(
                build_model(recipe, method, encoder, ranks.device).eval(),
                self.sets.encoded,
                max_tokens=REFERENCE_TOKENS * recipe.training.token_budget,
                autocast=torch.bfloat16 if recipe.training.precision == "bf16" else None,
            ).logps
        return self._references

    def _score(self, job: Job, references: NDArray[np.float32] | None, folder: Path) -> None:
        """Keep the scores of the test sets, and for the fused score the margins on validation data."""
        scores = _heads(job, self.sets.encoded, references)
        found = {"reward": scores.rewards, "implicit": scores.implicit}
        if scores.rewards is not None and scores.implicit is not None:
            groups, known = job.data.validation, job.validation_references
            held_out = _heads(job, groups, None if known is None else known.logps)
            assert held_out.rewards is not None
            assert held_out.implicit_per_token is not None
            kept = {
                REWARD_MARGINS: held_out.rewards,
                TOKEN_MARGINS: held_out.implicit_per_token,
            }
            for name, values in kept.items():
                found[name] = decided_margins(groups, values, held_out.first).astype(np.float32)
        atomic_write(folder / SCORES, save({k: v for k, v in found.items() if v is not None}))


def _heads(
    job: Job, groups: Sequence[TokenizedGroup], references: NDArray[np.float32] | None
) -> HeadScores:
    return score_heads(
        job.model,
        groups,
        references,
        job.method,
        max_tokens=2 * job.recipe.training.token_budget,
        autocast=job.autocast,
    )
