"""Models written from a run: at its end (`export_run`), or later or before (`hafrm export`).

A directory appears under its name only when a fresh process with plain transformers has reproduced its
golden scores; where that fails, it is kept as NAME.unverified. At a run's end the name is `model/`, so
its presence means that the run is complete. `hafrm export` only reads the run folder.
"""

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from hafrm.atomic import atomic_directory, remove_directory
from hafrm.data.encoding import Encoder
from hafrm.engine.model import HybridModel
from hafrm.errors import CheckpointError, ConfigError, DataError, ModelError
from hafrm.export.checklist import verify_directory
from hafrm.export.golden import GOLDEN, read_golden
from hafrm.export.model_card import write_cards
from hafrm.export.proof import PLAIN, check_golden, check_policy, prove, write_golden
from hafrm.export.stock_export import (
    export_adapter,
    export_policy,
    export_reward,
    gather_weights,
)
from hafrm.preferences import Group, Message
from hafrm.recipe import Recipe
from hafrm.recipe_file import load_recipe
from hafrm.results import write_result
from hafrm.run_folder import RunFolder, step_of
from hafrm.scoring.loading import (
    DTYPES,
    FUSED_RULE,
    load_config,
    load_encoder,
    load_policy,
    load_reward,
)
from hafrm.scoring.reward_model import IMPLICIT_RULE, ImplicitRule
from hafrm.training import parallel
from hafrm.training.checkpoint import STATE, load_weights
from hafrm.training.data_setup import NUM_GOLDEN, PreparedData, build_encoder, read_splits
from hafrm.training.methods import Method, resolve_method
from hafrm.training.model_setup import build_model
from hafrm.training.step_batches import References
from hafrm.training.validation import fit_on_validation

log = logging.getLogger("hafrm")

STORED = DTYPES[1:]  # not auto
"""Dtypes that weights can be stored in."""
MERGED = "merged"
"""Where the merged model lies beside an adapter until its scores are recorded."""
Head = Literal["reward", "policy"]


def export_run(
    run: RunFolder,
    recipe: Recipe,
    method: Method,
    data: PreparedData,
    model: HybridModel,
    references: References | None = None,
) -> None:
    """Write `model/reward` and `model/policy`, as far as the method trained them, and where it trained
    both the rule of their fused score, fitted on validation with its `references`.

    All ranks call. Their process group ends once the weights are gathered, and those that write nothing
    return before the proof, which may take an hour. The model is empty afterwards: its memory is the
    proof's. Raises VerificationError where the proof fails; the models are then kept.
    """
    dtype = _export_dtype(recipe)
    rule = None
    if method.trains_reward and method.trains_policy:
        rule = fit_on_validation(
            model,
            data.validation,
            references,
            method,
            max_tokens=2 * recipe.training.token_budget,
            autocast=torch.bfloat16 if dtype == torch.bfloat16 else None,
        )
        log.info("fitted on validation: %s", rule)
    weights = gather_weights(model)
    parallel.stop()
    if not parallel.is_main():
        return
    with atomic_directory(run.unverified_path, replace=True) as aside:
        if model.reward_head is not None:
            export_reward(weights, data.encoder, aside / "reward", dtype=dtype)
        if model.policy_head is not None:
            export_policy(weights, data.encoder, aside / "policy", dtype=dtype)
            write_result(aside / "policy" / IMPLICIT_RULE, _implicit_rule(recipe, method))
        if rule is not None:
            write_result(aside / FUSED_RULE, rule)
    del weights
    parallel.release(model)

    def check(models: Path) -> None:
        if (models / "reward").is_dir():
            num_golden = write_golden(models / "reward", data.golden)
            differences = check_golden(models / "reward")
            log.info("%d golden scores replayed by plain transformers: %s", num_golden, differences)
        write_cards(run.path, {head: models / head for head in ("reward", "policy")})

    prove(
        run.unverified_path,
        run.path / "model",
        check,
        f"the training is finished and loses nothing. Repeat the export and its proof with: hafrm train "
        f"--resume {run.path}; or see what differs with: hafrm verify {run.unverified_path / 'reward'}",
    )


def _export_dtype(recipe: Recipe) -> torch.dtype:
    """What a run's models are stored in: what it computed in."""
    return torch.bfloat16 if recipe.training.precision == "bf16" else torch.float32


def _implicit_rule(recipe: Recipe, method: Method) -> ImplicitRule:
    """How the trained policy scores a response by itself."""
    reference = recipe.model.path if method.scores_against_reference else None
    return ImplicitRule(reference, beta=method.beta, per_token=method.scores_per_token)


@dataclass(frozen=True)
class ExportOptions:
    """What `hafrm export` writes, from where, and how it is stored."""

    head: Head = "reward"
    dtype: str | None = None  # one of STORED; None: what the run computed in, as at its end
    merge_lora: bool | None = None
    """False: adapters beside the base checkpoint; None: merged, if there are any."""
    checkpoint: str | None = None
    """best, latest or a step; None: `model/` if the run has finished, else the best or latest."""

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in STORED:
            raise ConfigError(f"--dtype must be one of {', '.join(STORED)}, got {self.dtype!r}")
        if self.merge_lora is False and self.dtype not in (None, "float32"):
            raise ConfigError(
                f"--dtype {self.dtype} needs merged weights: adapters stay in float32; remove"
                " --dtype or --no-merge-lora"
            )
        if self.merge_lora is False and self.head == "policy":
            raise ConfigError(
                "--policy with --no-merge-lora is not possible: only reward models are written as "
                "adapters; merge it"
            )


@dataclass(frozen=True)
class Exported:
    """What was written, and the proof of it."""

    directory: Path
    head: Head
    source: str  # `model` or the checkpoint's name
    dtype: str
    merged: bool | None  # none where the run has no adapters
    num_golden: int  # conversations whose scores (or log-probs) plain transformers has replayed
    difference: float  # the largest, relative to max(1, |score|)


class _Source(NamedTuple):
    name: str  # `model` or the checkpoint's
    model: HybridModel
    encoder: Encoder
    golden: Sequence[Group]


def export_from_run(folder: Path, to: Path, options: ExportOptions | None = None) -> Exported:
    """Write one head of a run as a stock directory `to`, which appears once it is proved.

    Raises ConfigError and CheckpointError for what this run cannot give, ModelError and NumericsError for a
    model that must not be used, VerificationError for one that is written but not proved.
    """
    options = options or ExportOptions()
    if to.exists():
        raise CheckpointError(f"{to} exists already: remove it or choose another place")
    run = RunFolder.open(folder)
    recipe = load_recipe(run.recipe_path)
    method = resolve_method(recipe)
    _check_possible(recipe, method, options)
    dtype = getattr(torch, options.dtype) if options.dtype else _export_dtype(recipe)
    checkpoint = _choose_checkpoint(run, options, dtype)
    if checkpoint is None:
        source = _from_model(run, options.head)
    else:
        source = _from_checkpoint(run, recipe, checkpoint)
    merge = options.merge_lora is not False
    unverified = to.with_name(f"{to.name}.unverified")
    if unverified.exists():
        remove_directory(unverified)
    _write_head(source, recipe, method, options, unverified, dtype)
    parallel.release(source.model)

    def check(directory: Path) -> tuple[int, float]:
        if options.head == "policy":
            result = check_policy(directory, source.golden)
        else:
            complete = directory if merge else directory / MERGED
            result = _check_reward(directory, complete, source.golden)
        # A card of an adapter would say how to load a whole model; test results are of `model/` alone.
        if merge and (checkpoint is None or not (run.path / "test.json").is_file()):
            write_cards(run.path, {options.head: directory})
        return result

    num, difference = prove(unverified, to, check, "the same command repeats it and its proof")
    stored = dtype if merge else torch.float32
    return Exported(
        directory=to,
        head=options.head,
        source=source.name,
        dtype=str(stored).removeprefix("torch."),
        merged=None if recipe.lora is None else merge,
        num_golden=num,
        difference=difference,
    )


def _check_possible(recipe: Recipe, method: Method, options: ExportOptions) -> None:
    if recipe.lora is None and options.merge_lora is not None:
        raise ConfigError("the run has no adapters: remove --merge-lora or --no-merge-lora")
    if options.head == "reward" and not method.trains_reward:
        raise ConfigError(f"method {method.name} trains no reward head; export its --policy")
    if options.head == "policy" and not method.trains_policy:
        raise ConfigError(f"method {method.name} trains no policy head; remove --policy")


def _choose_checkpoint(run: RunFolder, options: ExportOptions, dtype: torch.dtype) -> Path | None:
    """The checkpoint to export; None for the finished run's `model/`."""
    finished = run.model_path / options.head
    if options.checkpoint is None and finished.is_dir() and options.merge_lora is not False:
        stored = load_config(finished).dtype
        if stored in (dtype, torch.float32):  # no other dtype undoes the rounding of a coarse one
            return None
    by_step = {step_of(path): path for path in run.checkpoints()}
    if not by_step:
        raise CheckpointError(
            f"{run.path} has no complete checkpoint to export: wait for the first one (checkpoint.every "
            "steps), or remove --dtype and --checkpoint where the run has finished"
        )
    latest = max(by_step)
    best = int(json.loads((by_step[latest] / STATE).read_text())["best_step"])  # -1 before any
    steps = {"best": best, "latest": latest, None: best if best in by_step else latest}
    if options.checkpoint in steps:
        step = steps[options.checkpoint]
    elif options.checkpoint is not None and options.checkpoint.isdecimal():
        step = int(options.checkpoint)
    else:
        raise ConfigError(
            f"--checkpoint must be best, latest or a step, got {options.checkpoint!r}"
        )
    if step not in by_step:
        reason = "nothing has been validated yet" if step < 0 else f"step {step} is not there"
        raise CheckpointError(
            f"{run.path} has no such checkpoint ({reason}); it has those of steps {sorted(by_step)}"
        )
    return by_step[step]


def _from_model(run: RunFolder, head: Head) -> _Source:
    path = run.model_path / head
    load = load_reward if head == "reward" else load_policy
    model = load(path, dtype=torch.float32, device="cpu")
    encoder = load_encoder(path, model.backbone.config, None)
    return _Source("model", model, encoder, _recorded_golden(run) or [])


def _from_checkpoint(run: RunFolder, recipe: Recipe, checkpoint: Path) -> _Source:
    encoder = build_encoder(recipe)
    training = recipe.training.model_copy(update={"compile": False})
    recipe = recipe.model_copy(update={"training": training})
    model = build_model(recipe, resolve_method(recipe), encoder, torch.device("cpu"))
    load_weights(checkpoint, model)
    golden = _recorded_golden(run)
    if golden is None:
        try:
            golden = list(read_splits(recipe).validation[:NUM_GOLDEN])
        except DataError as error:
            log.warning(
                "cannot read the run's data, so fewer conversations are replayed: %s", error
            )
            golden = []
    return _Source(checkpoint.name, model, encoder, golden)


def _recorded_golden(run: RunFolder) -> list[Group] | None:
    """The conversations of the run's own golden file, or None where it has none."""
    if not (run.model_path / "reward" / GOLDEN).is_file():
        return None
    groups = []
    for number, line in enumerate(read_golden(run.model_path / "reward")):
        if line.messages:
            *prompt, answer = line.messages
            messages = tuple(Message(m["role"], m["content"]) for m in prompt)
            groups.append(Group(f"golden {number}", messages, (answer["content"],)))
    return [group for group in groups if group.prompt != PLAIN.prompt]


def _write_head(
    source: _Source,
    recipe: Recipe,
    method: Method,
    options: ExportOptions,
    made: Path,
    dtype: torch.dtype,
) -> None:
    if options.head == "policy":
        export_policy(gather_weights(source.model), source.encoder, made, dtype=dtype)
        write_result(made / IMPLICIT_RULE, _implicit_rule(recipe, method))
        return
    complete = made
    if options.merge_lora is False:
        base = recipe.model.path, recipe.model.revision
        export_adapter(source.model, source.encoder, made, *base)
        complete, dtype = made / MERGED, torch.float32
    export_reward(gather_weights(source.model), source.encoder, complete, dtype=dtype)


def _check_reward(directory: Path, complete: Path, golden: Sequence[Group]) -> tuple[int, float]:
    """Record the golden scores of the complete model and replay them with the directory that is exported,
    which may be an adapter; returns their number and the largest difference."""
    num_golden = write_golden(complete, golden)
    checklist = verify_directory(complete, run_model=False)
    if not checklist.ok:
        faults = "; ".join(f"{r.name}: {r.observed} ({r.fix})" for r in checklist.failed)
        raise ModelError(f"the export would not serve every consumer: {faults}")
    if complete != directory:
        (complete / GOLDEN).rename(directory / GOLDEN)
        shutil.rmtree(complete)
    return num_golden, max(check_golden(directory).values())
