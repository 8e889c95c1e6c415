"""The verb `rlhf`: a policy trained against reward models."""

from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from hafrm.cli.entry import app
from hafrm.statistics import in_words


@app.command()
def rlhf(
    recipe: Annotated[str | None, typer.Argument(help="An RLHF recipe in YAML.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="key.sub=value ...")] = None,
    out: Annotated[Path | None, typer.Option(help="The run folder (default: runs/<time>).")] = None,
    resume: Annotated[Path | None, typer.Option(help="Resume this run folder.")] = None,
) -> None:
    """Train a policy against reward models with PPO, RLOO or GRPO, as a recipe says.

    Exit code 1 where the watchdog stopped the run; its best step is exported all the same.
    """
    from hafrm.errors import ConfigError  # noqa: PLC0415
    from hafrm.recipe_file import load_as  # noqa: PLC0415
    from hafrm.rlhf.rlhf_recipe import RlhfRecipe  # noqa: PLC0415

    if resume is not None:
        if recipe is not None and "=" in recipe:  # the first override stands where a recipe would
            overrides = [recipe, *(overrides or ())]
            recipe = None
        recipe, folder = recipe or str(resume / "recipe.yaml"), resume
    elif recipe is None:
        raise ConfigError("hafrm rlhf needs a recipe, or --resume with a run folder")
    else:
        folder = out or Path("runs") / datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
    loaded = load_as(RlhfRecipe, recipe, overrides or ())

    from hafrm.rlhf.train_policy import train_policy  # noqa: PLC0415

    result = train_policy(loaded, folder, resume=resume is not None)
    typer.echo(
        f"{result.num_steps} of {loaded.training.steps} steps; exported step {result.best_step}, the "
        f"best by its held-out {result.selected_by} measure, to {folder / 'model' / 'policy'}"
    )
    typer.echo(f"  held out: {in_words(result.best)}")
    if result.stopped is not None:
        typer.secho(f"stopped early: {result.stopped}", fg="red", err=True)
        raise typer.Exit(1)
