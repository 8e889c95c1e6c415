"""The verb `rlhf-compare`: which reward model makes the better policy."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hafrm.cli.entry import app
from hafrm.terminal import show_tables

if TYPE_CHECKING:
    from hafrm.alignment.judge import PairJudge


@app.command("rlhf-compare")
def rlhf_compare(  # noqa: PLR0913 - the verb and its options
    recipe: Annotated[str, typer.Argument(help="An RLHF recipe; its reward.models is not used.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.sub=value ...")] = None,
    *,
    out: Annotated[Path, typer.Option(help="The comparison's folder; the same one goes on.")],
    model: Annotated[
        list[str],
        typer.Option(help="A reward model, NAME=PATH; one NAME again: for the next seed."),
    ],
    test: Annotated[list[str], typer.Option(help="Prompts to judge the policies on; repeat.")],
    seeds: Annotated[int, typer.Option(help="Runs of each, with seeds 0, 1, ...", min=1)] = 3,
    algorithm: Annotated[
        list[str] | None, typer.Option(help="ppo, rloo or grpo; repeat (default: the recipe's).")
    ] = None,
    processes: Annotated[
        int | None, typer.Option(help="Runs at a time (default: one for each GPU, or one).")
    ] = None,
    gold: Annotated[
        str | None, typer.Option(help="demo: judge by the demo world's known reward.")
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(help="An OpenAI-compatible endpoint (http://.../v1) that is asked."),
    ] = None,
    judge_model: Annotated[
        str | None, typer.Option(help="Its model (default: the only one it lists).")
    ] = None,
) -> None:
    """One start policy and one recipe against several reward models: whose policy is better, at what KL.

    Cells are run folders under OUT/cells; the result is OUT/rlhf_comparison.json. Answers are compared by
    --judge in both orders, else by the gold reward where --gold says it is known, else by the reward model
    that evaluation.judge names.
    """
    from hafrm.alignment.rlhf.compare import compare  # noqa: PLC0415
    from hafrm.alignment.rlhf.recipe import RlhfRecipe  # noqa: PLC0415
    from hafrm.demo.gold import gold_reward  # noqa: PLC0415
    from hafrm.errors import ConfigError  # noqa: PLC0415
    from hafrm.process_pool import default_num_processes  # noqa: PLC0415
    from hafrm.recipe_file import load_as  # noqa: PLC0415
    from hafrm.tables.rlhf import rlhf_tables  # noqa: PLC0415

    models = _by_name(model)
    loaded = load_as(RlhfRecipe, recipe, [f"reward.models={model[0]}", *(overrides or ())])
    if gold not in (None, "demo"):
        raise ConfigError(f"--gold is {gold!r}; only demo's reward is known")
    found = compare(
        loaded,
        models,
        out,
        seeds=range(seeds),
        algorithms=algorithm or [loaded.algorithm.name],
        test=test,
        gold=gold_reward if gold else None,
        judge=None if judge is None else _asked(judge, judge_model),
        processes=processes or default_num_processes(),
        tell=partial(typer.echo, err=True),
    )
    show_tables(rlhf_tables(found))
    typer.echo(f"written to {out / 'rlhf_comparison.json'}")


def _asked(url: str, model: str | None) -> "PairJudge":
    from hafrm.alignment.endpoint import Endpoint, EndpointOptions  # noqa: PLC0415
    from hafrm.alignment.judge import EndpointJudge  # noqa: PLC0415
    from hafrm.alignment.reply_cache import ReplyCache  # noqa: PLC0415
    from hafrm.resumable import cache_folder  # noqa: PLC0415

    keys = ("HAFRM_JUDGE_KEY", "OPENAI_API_KEY")
    options = EndpointOptions(url=url, model=model, key_variables=keys)
    return EndpointJudge(Endpoint(options, ReplyCache(cache_folder("replies") / "replies.sqlite")))


def _by_name(models: list[str]) -> dict[str, list[str]]:
    """The paths of each name; raises ConfigError for what is not NAME=PATH."""
    from hafrm.errors import ConfigError  # noqa: PLC0415

    found: dict[str, list[str]] = {}
    for given in models:
        name, _, path = given.partition("=")
        if not name or not path or "/" in name:
            raise ConfigError(
                f"--model {given!r} is not of the form NAME=PATH, such as haf=runs/haf"
            )
        found.setdefault(name, []).append(path)
    return found
