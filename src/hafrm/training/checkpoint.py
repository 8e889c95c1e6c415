"""Everything a run needs to resume, on disk: trainable weights, optimiser state, step, RNG.

safetensors and JSON only, never a pickle. A checkpoint is complete or absent, and is checked against its
manifest at resume. Each rank of a sharded model writes and reads its own rows, so that nothing is gathered
and the number of ranks may change.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hafrm.atomic import (
    atomic_directory,
    check_manifest,
    quick_fingerprint,
    write_manifest,
)
from hafrm.errors import CheckpointError
from hafrm.recipe import Recipe, Section
from hafrm.recipe_file import dump_recipe, load_as
from hafrm.run_folder import RunFolder
from hafrm.scoring.model_files import find_adapter, load_config
from hafrm.tensor_files import TensorFiles, own_part, write_tensors
from hafrm.training import parallel
from hafrm.training.prepared_data import PreparedData

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
MAY_CHANGE = ("max_tokens", "gradient_checkpointing")
"""Keys of `training` that a resumed run may change: they affect gradients only by rounding."""
_OF_A_MODEL = (".safetensors", ".bin", ".json", ".jinja")  # without the model card


@contextlib.contextmanager
def open_run(recipe: Section, folder: Path, *, resume: bool) -> Iterator[RunFolder]:
    """The run's folder, created or opened by the main rank and locked in a `with` block; all ranks raise
    CheckpointError if that is unsafe."""
    with contextlib.ExitStack() as stack:

        def enter() -> RunFolder:
            text = dump_recipe(recipe)
            run = _reopen(recipe, folder) if resume else RunFolder.create(folder, text)
            stack.enter_context(run.lock())
            if not resume and run.recipe_path.read_text(encoding="utf-8") != text:
                raise CheckpointError(f"{folder} was just taken by another run: give another --out")
            return run

        yield parallel.from_main(enter)


def _reopen(recipe: Section, folder: Path) -> RunFolder:
    run = RunFolder.open(folder)
    now, first = recipe.model_dump(), load_as(type(recipe), run.recipe_path).model_dump()
    for name in MAY_CHANGE:
        now["training"][name] = first["training"][name]
    if now != first:
        raise CheckpointError(
            f"the recipe differs from {run.recipe_path}: resume with that, or start a new folder (resumed, "
            f"a run may only change {', '.join(f'training.{name}' for name in MAY_CHANGE)})"
        )
    return run


def record_provenance(run: RunFolder, recipe: Recipe, data: PreparedData) -> None:
    """Record versions, seed, counts of rows and groups, and digests of everything that the run depends on;
    raises CheckpointError if a resumed run was made from something else."""
    inputs = {
        **model_digests("model.path", recipe.model.path, recipe.model.revision),
        **model_digests("model.policy_from", recipe.model.policy_from),
        "the chat template": data.encoder.template_sha256,
        "the comparisons as token ids": data.token_digest,
    }
    details = {"counts": data.counts, "template_sha256": data.encoder.template_sha256}
    details |= {f"training.{name}": getattr(recipe.training, name) for name in MAY_CHANGE}
    seed, files = recipe.training.seed, data.file_digests
    run.record_provenance(seed=seed, data=files, inputs=inputs, details=details)


def model_digests(key: str, path: str | None, revision: str | None = None) -> dict[str, str]:
    """Digests of a model's weights, configs and tokenizer by "key file", or a hub id's commit. Large files
    have a `quick_fingerprint`, so that a start does not take minutes."""
    if path is None:
        return {}
    folder = Path(path)
    if not folder.is_dir():
        commit = getattr(load_config(path, revision), "_commit_hash", None)
        return {f"{key} {path}": str(commit)}
    heads = [folder / head for head in ("model/reward", "model/policy", "reward", "policy")]
    own = [head for head in heads if head.is_dir()] or [folder]
    files = sorted(f for head in own for f in head.iterdir() if f.suffix in _OF_A_MODEL)
    adapter = find_adapter(folder)
    base = {} if adapter is None else model_digests(key, adapter.base, adapter.revision)
    return base | {f"{key} {file}": quick_fingerprint(file) for file in files if file.is_file()}


def save_checkpoint(
    run: RunFolder,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
) -> Path:
    """Write `checkpoints/step-N` and return its path; all ranks call this. Shards need a shared folder."""
    parallel.reshard(model)
    trainable = _trainable(model)
    weights: dict[str, Tensor] = dict(trainable)
    moments = {
        f"{kind}/{name}": value
        for name, parameter in trainable.items()
        for kind, value in optimizer.state[parameter].items()
    }
    moments["rng"] = torch.get_rng_state()
    folder = run.checkpoint_path(step)
    with contextlib.ExitStack() as stack:
        aside = parallel.from_main(lambda: stack.enter_context(atomic_directory(folder)))

        def write() -> None:
            for file, tensors in ((MODEL, weights), (OPTIMIZER, moments)):
                write_own_part(aside / file, tensors)

        parallel.on_all(write)
        if parallel.is_main():
            (aside / STATE).write_text(json.dumps({"step": step, **state}, indent=1) + "\n")
            write_manifest(aside)
    parallel.wait()
    return folder


def write_own_part(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write this rank's rows of sharded tensors to its own file; the main rank also writes the others."""
    parts = {
        name: own_part(tensor)
        for name, tensor in sorted(tensors.items())  # the order differs in a resumed optimizer
        if (parallel.is_first_copy(tensor) if isinstance(tensor, DTensor) else parallel.is_main())
    }
    parts = {name: part for name, part in parts.items() if part.rows.numel()}
    if any(isinstance(tensor, DTensor) for tensor in tensors.values()):
        file = file.with_stem(f"{file.stem}-{dist.get_rank():05d}")
    if parts:
        write_tensors(file, parts)


class _Stored:
    """A checkpoint's files of a kind. Each rank reads its rows of shards; the main rank reads all else."""

    def __init__(self, folder: Path, file: str) -> None:
        self._pattern = folder, f"{Path(file).stem}*.safetensors"
        self.names: set[str] = parallel.from_main(lambda: self._files.names)

    @cached_property
    def _files(self) -> TensorFiles:
        folder, pattern = self._pattern
        return TensorFiles(sorted(folder.glob(pattern)))

    def fill(self, target: Tensor, name: str) -> Tensor:
        if isinstance(target, DTensor):
            self._files.fill(target, name)
            return target
        value = self._files.read(name) if parallel.is_main() else None
        return target.copy_(parallel.hand_out(value, target))


def load_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Restore a checkpoint's weights, moments and RNG, and return its state, unless it is damaged."""
    parallel.from_main(lambda: check_manifest(folder))
    load_weights(folder, model)
    parameters, stored = _trainable(model), _Stored(folder, OPTIMIZER)
    for key in sorted(stored.names):
        kind, _, name = key.partition("/")
        if kind == "rng":
            torch.set_rng_state(stored.fill(torch.get_rng_state(), key))
            continue
        parameter = parameters[name].detach()
        # AdamW counts steps in a scalar per parameter, which is never sharded.
        place = torch.zeros((), device=parameter.device) if kind == "step" else parameter
        optimizer.state[parameters[name]][kind] = stored.fill(torch.empty_like(place), key)
    return parallel.from_main(lambda: json.loads((folder / STATE).read_text()))


def load_weights(folder: Path, model: nn.Module) -> None:
    """Load a checkpoint's trainable weights into the model; all ranks call this."""
    parallel.reshard(model)
    parameters, stored = _trainable(model), _Stored(folder, MODEL)
    if other := sorted(stored.names ^ parameters.keys()):
        raise CheckpointError(
            f"{folder} was written by another model or recipe, {other[:4]} are not in both: resume with "
            "the recipe in the run folder"
        )
    for name, parameter in parameters.items():
        stored.fill(parameter.detach(), name)


def trainable_weights(model: nn.Module) -> dict[str, Tensor]:
    """Full copies of the trainable weights by name, on the CPU; shared ones once. All ranks call this."""
    copies = ((n, parallel.whole(p.detach())) for n, p in _trainable(model).items())
    return {name: whole.to("cpu", copy=True) for name, whole in copies}


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in parallel.unwrap(model).named_parameters() if p.requires_grad}
