"""The verb `rlhf`: a policy trained against reward models, or reward models compared by their policies."""

from functools import partial
from typing import Annotated

import typer

from hafrm.cli.entry import Out, Overrides, Processes, Recipe, Resume, app, parse_run, show_result
from hafrm.errors import ConfigError
from hafrm.statistics import in_words


@app.command("rlhf")
def rlhf_command(
    recipe: Recipe = None,
    overrides: Overrides = None,
    *,
    out: Out = None,
    resume: Resume = None,
    gold: Annotated[
        str | None, typer.Option(help="demo: the demo world's reward selects steps and scores.")
    ] = None,
    processes: Processes = None,
) -> None:
    """Train a policy against reward models with PPO, RLOO or GRPO, as a recipe says.

    With comparison.models each of them trains a policy from one start, and the policies are compared; the
    same command resumes a comparison. Exit code 1 where a run was stopped early; its best step is
    exported all the same.
    """
    from hafrm.demo.gold import gold_reward  # noqa: PLC0415
    from hafrm.recipe_file import load_as  # noqa: PLC0415
    from hafrm.rlhf.rlhf_recipe import RlhfRecipe  # noqa: PLC0415

    if gold not in (None, "demo"):
        raise ConfigError(f"--gold is {gold!r}; only demo's reward is known")
    source, changes, folder = parse_run(recipe, overrides, out, resume)
    loaded = load_as(RlhfRecipe, source, changes)
    truth = gold_reward if gold else None

    if loaded.comparison is not None:
        from hafrm.process_pool import default_num_processes  # noqa: PLC0415
        from hafrm.rlhf.policy_comparison import compare_policies  # noqa: PLC0415

        num, show = processes or default_num_processes(), partial(typer.echo, err=True)
        comparison = compare_policies(loaded, folder, gold=truth, num_processes=num, on_run=show)
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
