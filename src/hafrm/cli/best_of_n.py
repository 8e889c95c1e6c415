"""The verb `best-of-n`: reward models pick among the same candidates."""

from pathlib import Path
from typing import Annotated

import typer

from hafrm.cli.entry import app, show_result


@app.command("best-of-n")
def best_of_n_command(  # noqa: PLR0913 - the verb and its options
    models: Annotated[
        list[str], typer.Argument(help="Runs, reward or policy directories: PATH or NAME=PATH.")
    ],
    *,
    prompts: Annotated[
        list[str], typer.Option(help="Prompts; without --policy their responses are candidates.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for all results; a killed job resumes.")],
    policy: Annotated[
        str | None, typer.Option(help="Writes candidates: a causal LM's directory, or a URL.")
    ] = None,
    num: Annotated[int, typer.Option("-n", "--num", help="Candidates for each prompt.")] = 16,
    gold: Annotated[
        str | None, typer.Option(help="A gold score for every candidate: demo, or a model.")
    ] = None,
    judge: Annotated[str | None, typer.Option(help="Compares picks: an LLM at a URL.")] = None,
    seed: Annotated[int, typer.Option(help="Another seed gives other candidates.")] = 0,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="section.key=value (docs/best_of_n.md).")
    ] = None,
) -> None:
    """Score the same candidates with every model and compare what each picks, for n = 1 to N.

    Curves with intervals, gold score over KL where a gold score is known, wins between models.
    """
    from hafrm.best_of_n.run_best_of_n import BestOfNOptions, best_of_n  # noqa: PLC0415
    from hafrm.demo.gold import gold_reward  # noqa: PLC0415
    from hafrm.recipe_file import build_as  # noqa: PLC0415

    pick = {"models": models, "prompts": prompts, "policy": policy, "gold": gold, "judge": judge}
    values = {"pick": pick, "draw": {"num": num, "seed": seed}}
    options = build_as(BestOfNOptions, values, "the options", overrides=settings or ())
    result = best_of_n(options, out, golds={"demo": gold_reward})
    show_result(result)
    typer.echo(f"every number is in {out / 'best_of_n.json'}, every pick in {out / 'picks.jsonl'}")
