"""Everything a run needs to resume, on disk: trainable weights, optimiser state, step, RNG.

safetensors and JSON only, never a pickle. A checkpoint is complete or absent, and checked against its
manifest at resume. Only the main rank holds whole tensors, gathered and scattered one by one.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hafrm.atomic import (
    atomic_directory,
    check_manifest,
    fingerprint,
    quick_fingerprint,
    write_manifest,
)
from hafrm.data.reader import local_files
from hafrm.errors import CheckpointError
from hafrm.preferences import TokenizedGroup
from hafrm.recipe import Recipe, Section
from hafrm.recipe_file import dump_recipe, load_as
from hafrm.run_folder import RunFolder
from hafrm.scoring.loading import load_config
from hafrm.scoring.model_files import find_adapter
from hafrm.training import parallel
from hafrm.training.setup import PreparedData

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
MAY_CHANGE = ("max_tokens", "gradient_checkpointing")
"""Keys of `training` that a resumed run may set differently: they change gradients only in rounding."""
_OF_A_MODEL = (".safetensors", ".bin", ".json", ".jinja")  # not its card


@contextlib.contextmanager
def open_run(recipe: Section, folder: Path, *, resume: bool) -> Iterator[RunFolder]:
    """The run's folder, created or opened, and locked in a `with` block, by the main rank; all ranks raise
    CheckpointError where that is unsafe."""
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
    """Versions, seed, the counts of rows and groups, and digests of all that the run is made from; raises
    CheckpointError where a resumed run was made from something else."""
    inputs = {
        **model_digests("model.path", recipe.model.path, recipe.model.revision),
        **model_digests("model.policy_from", recipe.model.policy_from),
        "the chat template": data.encoder.template_sha256,
        "the comparisons as token ids": _digest_of_groups([*data.train, *data.validation]),
    }
    details = {
        "counts": data.counts,
        "template_sha256": data.encoder.template_sha256,
        **{f"training.{name}": getattr(recipe.training, name) for name in MAY_CHANGE},
    }
    digests = file_digests([*recipe.data.train, *recipe.data.validation, *recipe.data.test])
    run.record_provenance(seed=recipe.training.seed, data=digests, inputs=inputs, details=details)


def file_digests(entries: Iterable[str]) -> dict[str, str]:
    """Digests of the local files that data entries name."""
    files = {file for entry in entries for file in local_files(entry)}
    return {str(file): fingerprint(file) for file in sorted(files) if file.is_file()}


def model_digests(key: str, path: str | None, revision: str | None = None) -> dict[str, str]:
    """Digests of a model's weights, configs and tokenizer by "key file", or a hub id's commit; large files
    by `quick_fingerprint`, which takes no minutes at each start."""
    if path is None:
        return {}
    folder = Path(path)
    if not folder.is_dir():
        commit = getattr(load_config(path, revision), "_commit_hash", None)
        return {f"{key} {path}": str(commit)}
    heads = [folder / "model" / "reward", folder / "model" / "policy"]
    heads += [folder / "reward", folder / "policy"]
    own = [head for head in heads if head.is_dir()] or [folder]
    files = sorted(f for head in own for f in head.iterdir() if f.suffix in _OF_A_MODEL)
    adapter = find_adapter(folder)
    base = {} if adapter is None else model_digests(key, adapter.base, adapter.revision)
    return base | {f"{key} {file}": quick_fingerprint(file) for file in files if file.is_file()}


def _digest_of_groups(groups: Iterable[TokenizedGroup]) -> str:
    digest = hashlib.sha256()
    for group in groups:
        ids = (group.prompt_ids, *group.response_ids)
        digest.update(repr(([len(i) for i in ids], group.comparisons)).encode())
        for part in ids:
            digest.update(np.ascontiguousarray(part, np.int32).tobytes())
    return digest.hexdigest()


def save_checkpoint(
    run: RunFolder,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
) -> Path:
    """Write `checkpoints/step-N`; all ranks call, the main rank writes. Returns its path."""
    parallel.reshard(model)
    weights = trainable_weights(model)
    moments = _gathered(
        (f"{kind}/{name}", value)
        for name, parameter in _trainable(model).items()
        for kind, value in optimizer.state[parameter].items()
    )
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
    """Put a checkpoint's weights, moments and RNG in place and return its state, unless it is damaged."""
    parallel.from_main(lambda: check_manifest(folder))
    load_weights(folder, model)
    parameters = _trainable(model)
    for key, value in _read(folder / OPTIMIZER):
        kind, _, name = key.partition("/")
        if kind == "rng":
            torch.set_rng_state(parallel.hand_out(value, torch.get_rng_state()))
            continue
        parameter = parameters[name]
        # AdamW counts steps in a scalar per parameter, which is never sharded.
        place = torch.zeros((), device=parameter.device) if kind == "step" else parameter.detach()
        optimizer.state[parameter][kind] = parallel.hand_out(value, place)
    return parallel.from_main(lambda: json.loads((folder / STATE).read_text()))


def load_weights(folder: Path, model: nn.Module) -> None:
    """Put a checkpoint's trainable weights into the model; all ranks call."""
    parallel.reshard(model)
    parameters = _trainable(model)
    stored = set(parallel.from_main(lambda: _names(folder / MODEL)))
    if stored != parameters.keys():
        raise CheckpointError(
            f"{folder} was written by another model or recipe, {sorted(stored ^ parameters.keys())[:4]} "
            "are not in both: resume with the recipe in the run folder"
        )
    with torch.no_grad():
        for name, value in _read(folder / MODEL):
            parameters[name].copy_(parallel.hand_out(value, parameters[name].detach()))


def trainable_weights(model: nn.Module) -> dict[str, Tensor]:
    """The trainable weights by name, whole, on the main rank's CPU; shared ones once. All ranks call."""
    return _gathered(_trainable(model).items())


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in parallel.unwrap(model).named_parameters() if p.requires_grad}


def _gathered(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Copies on the main rank's CPU, and nothing on the others, whose hosts may be the same."""
    copies = {}
    for name, tensor in tensors:
        whole = parallel.whole(tensor.detach())
        if parallel.is_main():
            copies[name] = whole.to("cpu", copy=True)
    return copies


def _names(file: Path) -> list[str]:
    with safe_open(file, "pt") as content:
        return list(content.keys())


def _read(file: Path) -> Iterator[tuple[str, Tensor | None]]:
    """Each tensor of a file by name, for the main rank; the others get the names alone."""
    names = parallel.from_main(lambda: _names(file))
    main = safe_open(file, "pt") if parallel.is_main() else contextlib.nullcontext()
    with main as content:
        for name in names:
            yield name, None if content is None else content.get_tensor(name)
