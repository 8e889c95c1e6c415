"""The verb `compare`: methods against each other, trained under one budget."""

from pathlib import Path
from typing import Annotated

import typer

from hafrm.cli.entry import Overrides, Processes, app, show_result
from hafrm.recipe_file import load_recipe


@app.command("compare")
def compare_command(  # noqa: PLR0913 - the verb and its options
    recipe: Annotated[str, typer.Argument(help="A recipe in YAML, with data.test.")],
    overrides: Overrides = None,
    *,
    methods: Annotated[
        str, typer.Option(help="With commas, the baseline first; options as in haf:alpha=0.05.")
    ] = "bt,dpo,haf,grm-sft",
    seeds: Annotated[int, typer.Option(help="Runs of each method on each set.", min=1)] = 3,
    learning_rates: Annotated[
        str | None, typer.Option(help="With commas (default: the recipe's / 3, x 1, x 3).")
    ] = None,
    mixed: Annotated[bool, typer.Option(help="Also train and tune on all sets together.")] = True,
    processes: Processes = None,
    keep_models: Annotated[
        bool, typer.Option("--keep-models", help="Export every run's models, not only its scores.")
    ] = False,
    out: Annotated[Path, typer.Option(help="The comparison's folder.")] = Path("comparison"),
) -> None:
    """Train methods on each set of a recipe with several seeds, and test which differ significantly.

    Each entry of data.train is a training set. The same command resumes a comparison that was stopped.
    """
    from hafrm.process_pool import default_num_processes  # noqa: PLC0415
    from hafrm.study.method_comparison import COMPARISON_FILE, compare_methods  # noqa: PLC0415
    from hafrm.study.run_grid import parse_rates, plan_study  # noqa: PLC0415

    plan = plan_study(
        load_recipe(recipe, overrides or ()),
        methods.split(","),
        num_seeds=seeds,
        rates=parse_rates(learning_rates),
        mixed=mixed,
    )
    num = processes or default_num_processes()
    result = compare_methods(plan, out, processes=num, keep_models=keep_models)
    show_result(result)
    typer.echo(f"all numbers: {out / COMPARISON_FILE}")
