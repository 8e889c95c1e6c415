"""The verbs that take a recipe: `train`, `plan`, `compare` and `rlhf`."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from hafrm.cli import entry
from hafrm.errors import ConfigError
from hafrm.progress import show_progress
from hafrm.recipe import Recipe
from hafrm.recipe_file import load_as, load_recipe
from hafrm.statistics import in_words


@entry.app.command("train")
def train_command(
    recipe: entry.Recipe = None,
    overrides: entry.Overrides = None,
    out: entry.Out = None,
    resume: entry.Resume = None,
) -> None:
    """Train a reward model from a recipe, and export directories that stock transformers loads."""
    source, changes, folder = entry.parse_run(recipe, overrides, out, resume)
    loaded = load_recipe(source, changes)
    if resume is None:
        _check_files(loaded)
    from hafrm.evaluation import evaluate  # noqa: PLC0415
    from hafrm.export.model_card import write_cards  # noqa: PLC0415
    from hafrm.training import loop, parallel  # noqa: PLC0415

    try:
        result = loop.run_training(loaded, folder, resume=resume is not None)
        if not parallel.is_main():
            return
        steps = f"{result.num_steps} steps; exported step {result.best_step}"
        typer.echo(f"trained {steps} of {folder}")
        typer.echo(f"  validation: {in_words(result.best)}")
        if loaded.data.test:
            with show_progress("scoring test sets") as on_progress:
                options = loaded.data.reading_options
                tested = evaluate(folder, loaded.data.test, on_progress=on_progress, **options)
            entry.show_result(tested, folder / "test.json")
            write_cards(folder)
        typer.echo(f"use it:  hafrm evaluate {folder} DATA...   hafrm score {folder} IN --out OUT")
    finally:
        parallel.stop()


@entry.app.command("plan")
def plan_command(
    recipe: entry.RecipeFile,
    overrides: entry.Overrides = None,
    memory: Annotated[float | None, Option(help="GiB of a GPU (default: this one's).")] = None,
    ranks: Annotated[int, Option(help="Processes that share a step.", min=1)] = 1,
) -> None:
    """Estimate the memory that a recipe needs, before loading anything; exit code 1 if it does not fit."""
    loaded = load_recipe(recipe, overrides or ())
    from hafrm.training.memory_plan import plan_recipe  # noqa: PLC0415
    from hafrm.training.methods import resolve_method  # noqa: PLC0415

    need = plan_recipe(loaded, resolve_method(loaded), memory=memory, ranks=ranks)
    entry.show_result(need)
    if not need.fits:
        raise typer.Exit(1)


@entry.app.command("compare")
def compare_command(  # noqa: PLR0913 - the verb and its options
    recipe: entry.RecipeFile,
    overrides: entry.Overrides = None,
    *,
    methods: Annotated[str, Option(help="Baseline first; haf:alpha=0.05.")] = "bt,dpo,haf,grm-sft",
    seeds: Annotated[int, Option(help="Runs of each method on each set.", min=1)] = 3,
    learning_rates: Annotated[str | None, Option(help="Default: recipe's / 3, x 1, x 3.")] = None,
    mixed: Annotated[bool, Option(help="Also train and tune on all sets together.")] = True,
    processes: entry.Processes = None,
    keep_models: Annotated[bool, Option("--keep-models", help="Export all runs' models.")] = False,
    out: Annotated[Path, Option(help="The comparison's folder.")] = Path("comparison"),
) -> None:
    """Train methods (comma-separated) on each entry of data.train, and test which differ significantly.

    Run the same command again to resume a comparison that was stopped.
    """
    loaded = load_recipe(recipe, overrides or ())
    _check_files(loaded)
    from hafrm.process_pool import default_num_processes  # noqa: PLC0415
    from hafrm.study.method_comparison import COMPARISON_FILE, compare_methods  # noqa: PLC0415
    from hafrm.study.run_grid import parse_rates, plan_study  # noqa: PLC0415

    rates = parse_rates(learning_rates)
    plan = plan_study(loaded, methods.split(","), num_seeds=seeds, rates=rates, mixed=mixed)
    num = processes or default_num_processes()
    result = compare_methods(plan, out, processes=num, keep_models=keep_models)
    entry.show_result(result)
    typer.echo(f"all numbers: {out / COMPARISON_FILE}")


@entry.app.command("rlhf")
def rlhf_command(
    recipe: entry.Recipe = None,
    overrides: entry.Overrides = None,
    *,
    out: entry.Out = None,
    resume: entry.Resume = None,
    gold: Annotated[str | None, Option(help="demo: its gold reward selects steps.")] = None,
    processes: entry.Processes = None,
) -> None:
    """Train a policy against reward models with PPO, RLOO or GRPO, as a recipe says.

    With comparison.models, each reward model trains a policy from the same start, and the policies are
    compared; the same command resumes a comparison. Otherwise exit code 1 if the run was stopped early;
    its best step is still exported.
    """
    from hafrm.demo.gold import gold_reward  # noqa: PLC0415
    from hafrm.rlhf.rlhf_recipe import RlhfRecipe  # noqa: PLC0415

    if gold not in (None, "demo"):
        raise ConfigError(f"--gold is {gold!r}; only demo's reward is known")
    source, changes, folder = entry.parse_run(recipe, overrides, out, resume)
    loaded = load_as(RlhfRecipe, source, changes)
    truth = gold_reward if gold else None

    if loaded.comparison is not None:
        from hafrm.process_pool import default_num_processes  # noqa: PLC0415
        from hafrm.rlhf.policy_comparison import compare_policies  # noqa: PLC0415

        num, show = processes or default_num_processes(), partial(typer.echo, err=True)
        comparison = compare_policies(loaded, folder, gold=truth, num_processes=num, on_run=show)
        entry.show_result(comparison)
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


def _check_files(recipe: Recipe) -> None:
    """Fail at once if a data file is missing: loading torch takes longer than looking for it."""
    from hafrm.data.reader import check_sources  # noqa: PLC0415

    check_sources([*recipe.data.train, *recipe.data.validation, *recipe.data.test])
