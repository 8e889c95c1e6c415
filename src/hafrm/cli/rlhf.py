"""The verb `rlhf`: a policy trained against reward models, or reward models compared by their policies."""

from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from hafrm.cli.entry import app, show_result
from hafrm.statistics import in_words


@app.command("rlhf")
def rlhf_command(
    recipe: Annotated[str | None, typer.Argument(help="An RLHF recipe in YAML.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="key.sub=value ...")] = None,
    *,
    out: Annotated[
        Path | None, typer.Option(help="The run's or comparison's folder (default: runs/<time>).")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Resume this run folder.")] = None,
    gold: Annotated[
        str | None, typer.Option(help="demo: the demo world's reward selects steps and scores.")
    ] = None,
    processes: Annotated[
        int | None, typer.Option(help="Runs at a time (default: one for each GPU).", min=1)
    ] = None,
) -> None:
    """Train a policy against reward models with PPO, RLOO or GRPO, as a recipe says.

    With comparison.models each of them trains a policy from one start, and the policies are compared; the
    same command resumes a comparison. Exit code 1 where a run was stopped early; its best step is
    exported all the same.
    """
    from hafrm.demo.gold import gold_reward  # noqa: PLC0415
    from hafrm.errors import ConfigError  # noqa: PLC0415
    from hafrm.recipe_file import load_as  # noqa: PLC0415
    from hafrm.rlhf.rlhf_recipe import RlhfRecipe  # noqa: PLC0415

    if gold not in (None, "demo"):
        raise ConfigError(f"--gold is {gold!r}; only demo's reward is known")
    if resume is not None:
        # with --resume the first override is parsed as the recipe
        if recipe is not None and "=" in recipe:
            overrides, recipe = [recipe, *(overrides or ())], None
        recipe = recipe or str(resume / "recipe.yaml")
    elif recipe is None:
        raise ConfigError("hafrm rlhf needs a recipe, or --resume with a run folder")
    loaded = load_as(RlhfRecipe, recipe, overrides or ())
    now = datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
    folder = resume or out or Path("runs") / now
    truth = gold_reward if gold else None

    if loaded.comparison is not None:
        from hafrm.process_pool import default_num_processes  # noqa: PLC0415
        from hafrm.rlhf.policy_comparison import compare_policies  # noqa: PLC0415

        comparison = compare_policies(
            loaded,
            folder,
            gold=truth,
            num_processes=processes or default_num_processes(),
            on_run=partial(typer.echo, err=True),
        )
        show_result(comparison)
        typer.echo(f"written to {folder / 'rlhf_comparison.json'}")
        return

    from hafrm.rlhf.train_policy import train_policy  # noqa: PLC0415

    result = train_policy(loaded, folder, resume=resume is not None, gold=truth)
    typer.echo(
        f"{result.num_steps} of {loaded.training.steps} steps; exported step {result.best_step}, the "
        f"best by its held-out {result.selected_by} measure, to {folder / 'model' / 'policy'}"
    )
    typer.echo(f"  held out: {in_words(result.best)}")
    if result.stopped is not None:
        typer.secho(f"stopped early: {result.stopped}", fg="red", err=True)
        raise typer.Exit(1)
