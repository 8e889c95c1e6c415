"""Models written from a run: at its end (`export_run`), or at any other time (`hafrm export`).

A directory appears under its name only when a fresh process with plain transformers has reproduced its
golden scores; else it is kept as NAME.unverified. So `model/` means that the run is complete.
"""

import contextlib
import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from hafrm.atomic import atomic_directory, check_writable, remove_directory
from hafrm.data.encoding import Encoder
from hafrm.engine.model import HybridModel
from hafrm.errors import CheckpointError, ConfigError, DataError, ModelError
from hafrm.export.checklist import verify_directory
from hafrm.export.model_card import write_cards
from hafrm.export.plain_model import GOLDEN
from hafrm.export.proof import (
    InMemory,
    check_golden,
    check_policy,
    prove,
    score_in_memory,
    write_golden,
)
from hafrm.export.stock_export import export_adapter, export_policy, export_reward
from hafrm.preferences import Group
from hafrm.recipe import Recipe
from hafrm.recipe_file import load_recipe
from hafrm.results import write_result
from hafrm.run_folder import RunFolder, step_of
from hafrm.scoring.forward import free_memory
from hafrm.scoring.loading import DTYPES, base_directory, reference_place
from hafrm.scoring.model_files import find_adapter
from hafrm.scoring.reward_model import IMPLICIT_RULE, ImplicitRule
from hafrm.training import parallel
from hafrm.training.checkpoint import STATE, load_weights
from hafrm.training.methods import Method, resolve_method
from hafrm.training.prepared_data import NUM_GOLDEN, PreparedData
from hafrm.training.setup import (
    build_encoder,
    build_model,
    read_splits,
    with_training,
)

log = logging.getLogger("hafrm")

STORED = DTYPES[1:]  # not auto
MERGED = "merged"  # where the merged model lies beside an adapter until its scores are recorded
Head = Literal["reward", "policy"]


def export_run(run: RunFolder, recipe: Recipe, data: PreparedData, model: HybridModel) -> None:
    """Write `model/reward` and `model/policy`, as far as the method trained them; VerificationError if the
    proof fails, with the models kept.

    All ranks call this. Their process group ends once the weights are written, and ranks that write nothing
    return before the proof, which may take an hour. The model is empty afterwards.
    """
    if parallel.is_main():
        log.info("exporting; then a fresh process repeats the scores with plain transformers")
    dtype = _export_dtype(recipe)
    memory = _score_in_memory(model, data.encoder, data.golden, recipe)
    with contextlib.ExitStack() as stack:
        unverified = atomic_directory(run.unverified_path, replace=True)
        aside = parallel.from_main(lambda: stack.enter_context(unverified))
        place, to = aside / "reward", aside / "policy"
        if model.reward_head is not None:
            parallel.on_all(lambda: export_reward(model, data.encoder, place, dtype=dtype))
        if model.policy_head is not None:
            parallel.on_all(lambda: _write_policy(model, data.encoder, to, dtype, recipe))
    parallel.stop()
    parallel.release(model)
    if not parallel.is_main():
        return

    def check(models: Path) -> None:
        if (models / "reward").is_dir():
            num_golden = write_golden(models / "reward", memory)
            largest = max(check_golden(models / "reward").values(), default=0.0)
            said = "plain transformers gives %d golden scores of the export within %.1e"
            log.info(said, num_golden, largest)
        if (models / "policy").is_dir():
            check_policy(models / "policy", memory)
        write_cards(run.path, {head: models / head for head in ("reward", "policy")})

    prove(
        run.unverified_path,
        run.path / "model",
        check,
        f"no training is lost. Repeat the export and its proof with: hafrm train --resume {run.path}; see "
        f"what differs with: hafrm verify {run.unverified_path / 'reward'}",
    )


def _score_in_memory(
    model: HybridModel, encoder: Encoder, golden: Sequence[Group], recipe: Recipe
) -> InMemory:
    # no more tokens at once than fit in training, where a micro-batch holds two such responses
    limit = 4 * recipe.data.max_length
    # with log-probs, to compare with the export's, whatever the method reads
    model.transform = replace(model.transform, normalised=True)
    autocast = torch.bfloat16 if recipe.training.precision == "bf16" else None
    return score_in_memory(model, encoder, golden, max_tokens=limit, autocast=autocast)


def _export_dtype(recipe: Recipe) -> torch.dtype:
    return torch.bfloat16 if recipe.training.precision == "bf16" else torch.float32


def _write_policy(
    model: HybridModel, encoder: Encoder, to: Path, dtype: torch.dtype, recipe: Recipe
) -> None:
    export_policy(model, encoder, to, dtype=dtype)
    if not parallel.is_main():
        return
    method = resolve_method(recipe)
    reference = reference_place(recipe.model) if method.scores_against_reference else None
    revision = recipe.model.revision if reference else None
    if reference and Path(reference).is_dir():  # loaded later, perhaps from another directory
        reference, revision = str(Path(reference).absolute()), None
    elif reference and find_adapter(reference, revision) is None:  # the hub's main may move
        revision = getattr(model.backbone.config, "_commit_hash", None) or revision
    if recipe.model.policy_from and method.scores_against_reference:
        log.warning(
            "no checkpoint holds the reference of the policy (its LM head is that of model.policy_from): "
            "its implicit reward is the log-prob alone"
        )
    if recipe.model.quantization and method.scores_against_reference:
        log.warning("the policy's implicit reward will be against its base as it is, not in 4 bits")
    per_token, logits = method.scores_per_token, method.reads_logits
    rule = ImplicitRule(reference, method.beta, per_token, logits, revision)
    write_result(to / IMPLICIT_RULE, rule)


class ExportOptions(NamedTuple):
    """What `hafrm export` writes, from which checkpoint, and how it is stored."""

    head: Head = "reward"
    dtype: str | None = None  # one of STORED; None: what the run computed in, as at its end
    merge_lora: bool | None = None  # False: adapters beside the base; None: merged, if any
    checkpoint: str = "best"  # (the latest before any validation), latest or a step


class Exported(NamedTuple):
    """What was written, and the result of its proof."""

    source: str  # the checkpoint's name
    dtype: str
    merged: bool | None  # None if the run has no adapters
    num_golden: int  # conversations whose scores (or log-probs) plain transformers has replayed
    difference: float  # the largest, relative to max(1, |score|)


def export_from_run(folder: Path, to: Path, options: ExportOptions) -> Exported:
    """Write one head of a run as a stock directory `to`, which appears once it is proved."""
    if to.exists():
        raise CheckpointError(f"{to} exists already: remove it or choose another place")
    run = RunFolder.open(folder)
    recipe = load_recipe(run.recipe_path)
    method = resolve_method(recipe)
    _check_possible(recipe, method, options)
    dtype = getattr(torch, options.dtype) if options.dtype else _export_dtype(recipe)
    checkpoint, is_best = _choose_checkpoint(run, options.checkpoint)
    merge = options.merge_lora is not False
    unverified = to.with_name(f"{to.name}.unverified")
    check_writable(to)
    if unverified.exists():
        configs = unverified / "config.json", unverified / "adapter_config.json"
        if not any(map(Path.is_file, configs)):
            problem = "is not an export: move it away or choose another place"
            raise CheckpointError(f"{unverified} {problem}")
        log.info("%s, whose proof failed, is replaced", unverified)
        remove_directory(unverified)
    golden: Sequence[Group] = ()
    try:
        golden = read_splits(recipe)[2][:NUM_GOLDEN]
    except DataError as error:
        log.warning("cannot read the run's data, so fewer conversations are replayed: %s", error)
    encoder = build_encoder(recipe)
    model = build_model(with_training(recipe, compile=False), method, encoder, torch.device("cpu"))
    load_weights(checkpoint, model)
    memory = _score_in_memory(model, encoder, golden, recipe)
    complete = unverified if merge else unverified / MERGED
    if options.head == "policy":
        _write_policy(model, encoder, unverified, dtype, recipe)
    else:
        if not merge:
            base, dtype = base_directory(recipe.model.path), torch.float32
            export_adapter(model, encoder, unverified, base, recipe.model.revision)
        export_reward(model, encoder, complete, dtype=dtype)
    del model
    free_memory()  # the proof loads the model again

    def check(directory: Path) -> tuple[int, float]:
        if options.head == "policy":
            result = check_policy(directory, memory)
        else:
            result = _check_reward(directory, complete, memory)
        # An adapter's card would say how to load a whole model; test results are those of the best step.
        if merge and (is_best or not (run.path / "test.json").is_file()):
            write_cards(run.path, {options.head: directory})
        return result

    num, difference = prove(unverified, to, check, "the same command repeats it and its proof")
    stored, merged = str(dtype).removeprefix("torch."), None if recipe.lora is None else merge
    return Exported(checkpoint.name, stored, merged, num, difference)


def _check_possible(recipe: Recipe, method: Method, options: ExportOptions) -> None:
    policy, dtype, merge = options.head == "policy", options.dtype, options.merge_lora
    untrained = not (method.trains_policy if policy else method.trains_reward)
    instead = "remove --policy" if policy else "export its --policy"
    is_adapter = merge is False and find_adapter(base_directory(recipe.model.path)) is not None
    refusals = {
        f"--dtype must be one of {', '.join(STORED)}, got {dtype!r}": dtype not in (None, *STORED),
        "the run has no adapters: remove --[no-]merge-lora": merge is not None and not recipe.lora,
        "only reward models become adapters: remove --no-merge-lora": merge is False and policy,
        "adapters stay in float32: remove --dtype": merge is False
        and dtype not in (None, "float32"),
        "the adapters' base was quantised, and is not on disk so: remove --no-merge-lora": (
            merge is False and recipe.model.quantization is not None
        ),
        "model.path is an adapter itself, so another one needs its merged base: remove --no-merge-lora": (
            is_adapter
        ),
        f"method {method.name} trains no {options.head} head; {instead}": untrained,
    }
    for message, is_refused in refusals.items():
        if is_refused:
            raise ConfigError(message)


def _choose_checkpoint(run: RunFolder, wanted: str) -> tuple[Path, bool]:
    """The checkpoint to export, and whether it is the best validated one so far."""
    by_step = {step_of(path): path for path in run.checkpoints()}
    if not by_step:
        raise CheckpointError(
            f"{run.path} has no complete checkpoint to export yet (checkpoint.every steps)"
        )
    latest = max(by_step)
    best = int(json.loads((by_step[latest] / STATE).read_text())["best_step"])  # -1 before any
    if wanted in ("best", "latest"):
        step = best if wanted == "best" and best >= 0 else latest
    elif wanted.isdecimal():
        step = int(wanted)
    else:
        raise ConfigError(f"--checkpoint must be best, latest or a step, got {wanted!r}")
    if step not in by_step:
        raise CheckpointError(
            f"{run.path} has no checkpoint of step {step}; it has those of steps {sorted(by_step)}: name "
            "one with --checkpoint"
        )
    return by_step[step], step == best


def _check_reward(directory: Path, complete: Path, memory: InMemory) -> tuple[int, float]:
    """(number of golden scores of the complete model, largest difference in the directory); the directory
    may be an adapter."""
    num_golden = write_golden(complete, memory)
    checklist = verify_directory(complete, run_model=False)
    if not checklist.ok:
        faults = "; ".join(f"{r.name}: {r.observed} ({r.fix})" for r in checklist.failed)
        raise ModelError(f"the export would not serve every consumer: {faults}")
    if complete != directory:
        (complete / GOLDEN).rename(directory / GOLDEN)
        shutil.rmtree(complete)
    return num_golden, max(check_golden(directory).values())
