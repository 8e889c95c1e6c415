"""Everything a run needs to go on, on disk: trainable weights, optimiser state, place, RNG.

safetensors and JSON only, never a pickle. A checkpoint is complete or absent: written aside, synced,
renamed, and checked against its manifest at resume. Shards are gathered on the main rank; what is
frozen is not stored, since the base checkpoint has it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hafrm.atomic import atomic_directory, check_manifest, write_manifest
from hafrm.errors import CheckpointError
from hafrm.run_folder import RunFolder
from hafrm.training import parallel

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"


def save_checkpoint(
    run: RunFolder,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
) -> Path:
    """Write `checkpoints/step-N`; all ranks call, the main rank writes. Returns its path."""
    weights = trainable_weights(model)
    moments = _optimizer_state(model, optimizer)
    folder = run.checkpoint_path(step)
    if parallel.is_main():
        moments["rng"] = torch.get_rng_state()
        with atomic_directory(folder) as aside:
            save_file(weights, aside / MODEL)
            save_file(moments, aside / OPTIMIZER)
            (aside / STATE).write_text(json.dumps({"step": step, **state}, indent=1) + "\n")
            write_manifest(aside)
    parallel.wait()
    return folder


def load_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Put a checkpoint's weights, moments and RNG in place and return its state.

    Raises CheckpointError when a file is missing or damaged, or belongs to another model.
    """
    check_manifest(folder)
    load_weights(folder, model)
    moments = load_file(folder / OPTIMIZER)
    torch.set_rng_state(moments.pop("rng"))
    parameters = dict(parallel.inside(model).named_parameters())
    for key, value in moments.items():
        kind, name = key.split("/", 1)
        parameter = parameters[name]
        # AdamW counts steps in a scalar per parameter, which is never sharded.
        placed = value.to(parameter.device) if value.dim() == 0 else parallel.like(value, parameter)
        optimizer.state[parameter][kind] = placed
    state: dict[str, Any] = json.loads((folder / STATE).read_text())
    return state


def load_weights(folder: Path, model: nn.Module) -> None:
    """Put a checkpoint's trainable weights into the model."""
    weights = load_file(folder / MODEL)
    parameters = _trainable(model)
    if weights.keys() != parameters.keys():
        differing = sorted(weights.keys() ^ parameters.keys())[:4]
        raise CheckpointError(
            f"{folder} was written by another model or recipe: {differing} are not in both; "
            "resume with the recipe that the run folder holds"
        )
    with torch.no_grad():
        for name, value in weights.items():
            parameters[name].copy_(parallel.like(value, parameters[name]))


def trainable_weights(model: nn.Module) -> dict[str, Tensor]:
    """The trainable weights by name, whole, on the CPU; shared ones once."""
    return {name: parallel.whole(p.detach()).cpu().clone() for name, p in _trainable(model).items()}


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in parallel.inside(model).named_parameters() if p.requires_grad}


def _optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{kind}/{name}": parallel.whole(value).detach().cpu().clone()
        for name, parameter in _trainable(model).items()
        for kind, value in optimizer.state[parameter].items()
    }
