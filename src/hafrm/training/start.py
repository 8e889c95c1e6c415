"""The start of a run: its precision, its folder, made or opened again, and the record of its origin."""

import logging
from pathlib import Path

from hafrm.atomic import fingerprint
from hafrm.data.reader import local_files
from hafrm.errors import CheckpointError
from hafrm.recipe import Recipe
from hafrm.recipe_file import dump_recipe, load_recipe
from hafrm.run_folder import RunFolder
from hafrm.scoring.loading import has_bfloat16
from hafrm.training import parallel
from hafrm.training.prepare import PreparedData

log = logging.getLogger("hafrm")

MAY_CHANGE = ("max_tokens", "gradient_checkpointing")
"""Keys of `training` that a resumed run may set anew: they change memory and speed, and no gradient but
in its rounding."""


def open_run(recipe: Recipe, folder: Path, *, resume: bool) -> RunFolder:
    """The run's folder: made or opened by the main rank; raises CheckpointError where that is unsafe."""
    return parallel.from_main(
        lambda: _reopen(recipe, folder) if resume else RunFolder.create(folder, dump_recipe(recipe))
    )


def _reopen(recipe: Recipe, folder: Path) -> RunFolder:
    run = RunFolder.open(folder)
    began = load_recipe(run.recipe_path)
    kept = {name: getattr(began.training, name) for name in MAY_CHANGE}
    training = recipe.training.model_copy(update=kept)
    if recipe.model_copy(update={"training": training}) != began:
        raise CheckpointError(
            f"the recipe differs from the one that {folder} was started with; resume with "
            f"{run.recipe_path}, or start a new folder (a resumed run may only change "
            f"{', '.join(f'training.{name}' for name in MAY_CHANGE)})"
        )
    return run


def with_precision(recipe: Recipe, device: str) -> Recipe:
    """The recipe with training.precision decided for a device type, `cuda` or `cpu`: a run's own copy says
    what it computed in, and no resume on another machine may change that."""
    if recipe.training.precision != "auto":
        return recipe
    precision = "bf16" if has_bfloat16(device) else "fp32"
    if parallel.is_main():
        log.info("training.precision auto: %s on %s", precision, device)
    training = recipe.training.model_copy(update={"precision": precision})
    return recipe.model_copy(update={"training": training})


def record_provenance(run: RunFolder, recipe: Recipe, data: PreparedData) -> None:
    """Versions, seed, digests of local data files, and what became of the rows."""
    entries = [*recipe.data.train, *recipe.data.validation, *recipe.data.test]
    files = {file for entry in entries for file in local_files(entry)}
    digests = {str(file): fingerprint(file) for file in sorted(files) if file.is_file()}
    details = {
        "counts": data.counts,
        "template_sha256": data.encoder.template_sha256,
        **{f"training.{name}": getattr(recipe.training, name) for name in MAY_CHANGE},
    }
    run.record_provenance(seed=recipe.training.seed, data=digests, details=details)
