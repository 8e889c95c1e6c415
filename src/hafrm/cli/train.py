"""The verbs `train` and `plan`: run a recipe, and the memory that it will need."""

from typing import Annotated

import typer

from hafrm.cli.entry import Out, Overrides, Recipe, Resume, app, parse_run, show_result
from hafrm.progress import show_progress
from hafrm.recipe_file import load_recipe
from hafrm.statistics import in_words


@app.command("train")
def train_command(
    recipe: Recipe = None, overrides: Overrides = None, out: Out = None, resume: Resume = None
) -> None:
    """Train a reward model as a recipe says, and export it once others can load it."""
    source, changes, folder = parse_run(recipe, overrides, out, resume)
    loaded = load_recipe(source, changes)
    from hafrm.evaluation import evaluate  # noqa: PLC0415
    from hafrm.export.model_card import write_cards  # noqa: PLC0415
    from hafrm.training import loop, parallel  # noqa: PLC0415

    try:
        result = loop.run_training(loaded, folder, resume=resume is not None)
        if not parallel.is_main():
            return
        typer.echo(
            f"trained {result.num_steps} steps; exported step {result.best_step} of {folder}"
        )
        typer.echo(f"  validation: {in_words(result.best)}")
        if loaded.data.test:
            with show_progress("scoring test sets") as on_progress:
                tested = evaluate(folder, loaded.data.test, on_progress=on_progress)
            show_result(tested, folder / "test.json")
            write_cards(folder)
        typer.echo(f"use it:  hafrm evaluate {folder} DATA...   hafrm score {folder} IN --out OUT")
    finally:
        parallel.stop()


@app.command("plan")
def plan_command(
    recipe: Annotated[str, typer.Argument(help="A recipe in YAML.")],
    overrides: Overrides = None,
    memory: Annotated[
        float | None, typer.Option(help="GiB of each GPU (default: this machine's GPU, or RAM).")
    ] = None,
    ranks: Annotated[int, typer.Option(help="Processes that share a step.", min=1)] = 1,
) -> None:
    """The memory that a recipe will need, before anything is loaded; exit code 1 where it does not fit."""
    from hafrm.training.memory_plan import plan_recipe  # noqa: PLC0415
    from hafrm.training.methods import resolve_method  # noqa: PLC0415

    loaded = load_recipe(recipe, overrides or ())
    need = plan_recipe(loaded, resolve_method(loaded), memory=memory, ranks=ranks)
    show_result(need)
    if not need.fits:
        raise typer.Exit(1)
