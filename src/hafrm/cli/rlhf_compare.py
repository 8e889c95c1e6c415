"""The verb `rlhf-compare`: which reward model makes the better policy."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from hafrm.cli.entry import app


@app.command(name="rlhf-compare")
def rlhf_compare(  # noqa: PLR0913 - the verb and its options
    recipe: Annotated[str, typer.Argument(help="An RLHF recipe; its reward.models is not used.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.sub=value ...")] = None,
    *,
    model: Annotated[
        list[str], typer.Option(help="NAME=PATH of a reward model; repeat a NAME for its seeds.")
    ],
    test: Annotated[list[str], typer.Option(help="Prompts that neither train nor select.")],
    out: Annotated[Path, typer.Option(help="Folder for all runs; a killed comparison resumes.")],
    seeds: Annotated[int, typer.Option(help="Runs of each contender.", min=1)] = 1,
    algorithm: Annotated[
        list[str] | None, typer.Option(help="ppo, rloo, grpo (default: the recipe's); repeatable.")
    ] = None,
    processes: Annotated[
        int | None, typer.Option(help="Runs at a time (default: one per GPU).", min=1)
    ] = None,
    gold: Annotated[
        str | None, typer.Option(help="demo: score by the demo world's reward.")
    ] = None,
    judge: Annotated[str | None, typer.Option(help="Compares answers: a URL, or a model.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="judge.key=value (docs/best_of_n.md).")
    ] = None,
) -> None:
    """Train one start policy against several reward models: whose policy is better, and at what KL.

    Runs are in OUT/runs, the result is OUT/rlhf_comparison.json. Answers are compared by --judge in both
    orders, else by the gold reward, else by the reward model that evaluation.judge names.
    """
    from hafrm.best_of_n.options import JudgeOptions, load_judge  # noqa: PLC0415
    from hafrm.demo.gold import gold_reward  # noqa: PLC0415
    from hafrm.errors import ConfigError  # noqa: PLC0415
    from hafrm.process_pool import default_num_processes  # noqa: PLC0415
    from hafrm.recipe_file import build_as  # noqa: PLC0415
    from hafrm.report.terminal import print_tables  # noqa: PLC0415
    from hafrm.rlhf.policy_comparison import (  # noqa: PLC0415
        compare_policies,
        load_comparison_recipe,
        named_models,
    )

    models = named_models(model)
    shared = load_comparison_recipe(recipe, model[0].partition("=")[2], overrides or ())
    if gold not in (None, "demo"):
        raise ConfigError(f"--gold is {gold!r}; only demo's reward is known")
    options = build_as(JudgeOptions, {}, "the options", overrides=settings or ())
    result = compare_policies(
        shared,
        models,
        out,
        seeds=range(seeds),
        algorithms=algorithm or [shared.algorithm.name],
        test=test,
        gold=gold_reward if gold else None,
        judge=None if judge is None else load_judge(judge, options.judge, options.endpoint),
        num_processes=processes or default_num_processes(),
        on_run=partial(typer.echo, err=True),
    )
    print_tables(result.tables())
    typer.echo(f"written to {out / 'rlhf_comparison.json'}")
