"""One run of a study: train it, score the test sets with its best weights in memory, keep the scores.

A run with a `result.json` is finished; a run that was killed is resumed. A run that only helps to choose a
learning rate keeps its checkpoints until the choice is made, and scores nothing.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save

from hafrm.atomic import atomic_write
from hafrm.errors import DivergedError
from hafrm.evaluation.comparisons import Comparisons, read_comparisons
from hafrm.preferences import TokenizedGroup
from hafrm.recipe import Recipe
from hafrm.results import read_result, write_result
from hafrm.scoring.loading import reference_place
from hafrm.study.run_grid import StudyPlan, StudyRun
from hafrm.training import parallel
from hafrm.training.loop import Job, export_job, run_training
from hafrm.training.memory_plan import with_token_budget
from hafrm.training.methods import get_method
from hafrm.training.passes import pass_tokens, reference_logps, score_heads
from hafrm.training.prepared_data import PreparedData, prepare_data
from hafrm.training.setup import build_encoder, build_model

RUN_RESULT, SCORES_FILE = "result.json", "scores.safetensors"


@dataclass(frozen=True)
class RunResult:
    """The result of a finished run."""

    validation: dict[str, float]  # of the best step; empty if the run diverged
    num_steps: int
    seconds: float  # of the process that finished it; for a resumed run, only of its last part
    diverged: str | None = None  # the error of a run whose loss or gradient was not finite
    is_scored: bool = True  # whether the test sets were scored


@dataclass(frozen=True)
class StudyData:
    """The test sets of a study, the same for all its runs."""

    comparisons: Comparisons
    tokenized: Sequence[TokenizedGroup]

    @property
    def digest(self) -> str:
        """What stored scores depend on: all texts and comparisons, in their order."""
        digest = hashlib.sha256()
        for group in self.comparisons.groups:
            digest.update(json.dumps(asdict(group), sort_keys=True).encode())
        return digest.hexdigest()


def read_study_data(recipe: Recipe) -> StudyData:
    """The recipe's test sets; raises DataError for one without comparisons."""
    data = recipe.data
    _, comparisons = read_comparisons(data.test, **data.reading_options)
    encoder = build_encoder(recipe, too_long="cut")
    groups = comparisons.groups
    tokenized, report = encoder.encode(groups)
    report.check(groups, data.max_bad_fraction)
    if report.refused:
        comparisons = Comparisons.of([g for i, g in enumerate(groups) if i not in report.refused])
    return StudyData(comparisons, tokenized)


def read_run_result(folder: Path) -> RunResult | None:
    """A run's result, or None if it has not finished."""
    file = folder / RUN_RESULT
    return read_result(file, RunResult) if file.is_file() else None


class RunWorker:
    """Does runs of one study in this process; what several of them need is prepared once."""

    def __init__(self, plan: StudyPlan, root: Path, *, keep_models: bool = False) -> None:
        self.plan, self.root, self.keep_models = plan, root, keep_models
        self.data = read_study_data(plan.recipe)
        self._references: dict[bool, NDArray[np.float32]] = {}  # whether logits
        self._prepared: dict[tuple[str, int], PreparedData] = {}

    def __call__(self, run: StudyRun) -> RunResult:
        """Train a run and score it, resume it if it was killed, or read its result."""
        folder, recipe = run.folder(self.root), self.plan.recipe_of(run)
        before = read_run_result(folder)
        if before is not None and (before.is_scored or before.diverged or not run.is_scored):
            return before
        # a tuning run that turns out to be the chosen one is scored only now
        began = time.monotonic() - (0.0 if before is None else before.seconds)

        def finish(job: Job) -> None:
            if run.is_scored:
                self._score(job, folder)
                if self.keep_models:
                    export_job(job)

        # a killed run has left its recipe, and perhaps a checkpoint
        resume, key = (folder / "recipe.yaml").is_file(), (run.train, run.seed)
        # methods with the same seed and set train on exactly the same data
        if key not in self._prepared:
            self._prepared = {key: prepare_data(recipe)}
        try:
            data = self._prepared[key]
            trained = run_training(recipe, folder, resume=resume, data=data, finish=finish)
            seconds = time.monotonic() - began
            result = RunResult(trained.best, trained.num_steps, seconds, is_scored=run.is_scored)
        # other NumericsErrors do not depend on the learning rate, and end the study
        except DivergedError as error:
            result = RunResult({}, 0, time.monotonic() - began, diverged=str(error))
        # an unscored run may still be chosen, and is then scored from its checkpoint
        if result.is_scored:
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        write_result(folder / RUN_RESULT, result)
        return result

    def _test_references(self, *, logits: bool = False) -> NDArray[np.float32]:
        """The starting checkpoint's log-probs of the test sets, or its logits, computed once."""
        if logits not in self._references:
            method = get_method("dpo-logits" if logits else "dpo")
            ranks = parallel.start()
            # decided as in `train`, so that policy and reference are computed in the same way
            recipe = with_token_budget(self.plan.recipe, method, ranks)
            self._references[logits] = reference_logps(
                build_model(recipe, method, build_encoder(recipe), ranks.device).eval(),
                self.data.tokenized,
                max_tokens=pass_tokens(recipe.training.token_budget),
                autocast=torch.bfloat16 if recipe.training.precision == "bf16" else None,
                path=reference_place(recipe.model),
            ).logps
        return self._references[logits]

    def _score(self, job: Job, folder: Path) -> None:
        """Store the scores of the test sets."""
        budget = pass_tokens(job.recipe.training.token_budget)
        references = None
        if job.method.needs_reference:
            references = self._test_references(logits=job.method.reads_logits)
        scores = score_heads(
            job.model,
            self.data.tokenized,
            references,
            job.method,
            max_tokens=budget,
            autocast=job.autocast,
        )
        stored = {"reward": scores.rewards, "implicit": scores.implicit}
        arrays = {name: values for name, values in stored.items() if values is not None}
        atomic_write(folder / SCORES_FILE, save(arrays))
