"""The command line: parse, call the library, print. The only place that prints and exits.

Verbs import what they need when they run, so `hafrm --help` answers at once. Tables go to standard
output, progress and log to standard error. Exit codes: 0 done, 1 refused or failed, 2 wrong usage,
143 stopped by a signal with its state saved.
"""

import logging
import os
import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from hafrm.errors import HafrmError
from hafrm.intervals import in_words
from hafrm.scoring.inputs import ROWS_PER_SHARD
from hafrm.terminal import show_count, show_pace, show_tables, write_json

STOPPED = 143

app = typer.Typer(
    name="hafrm",
    help="Train, evaluate and use reward models that keep their language-model head.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line; hafrm's own errors become one message and an exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("hafrm").setLevel(logging.INFO)
    # transformers shows a bar for every shard that it loads or writes; ours say enough.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app()
    except HafrmError as error:
        typer.secho(f"{type(error).__name__}: {error}", fg="red", err=True)
        sys.exit(STOPPED if type(error).__name__ == "StoppedError" else 1)


_SOURCES = typer.Argument(
    help="Files (.json .jsonl .csv .parquet, .gz), file#split=test, hub:name:split, set:name."
)
Sources = Annotated[list[str], _SOURCES]
OptionalSources = Annotated[list[str] | None, _SOURCES]
JsonFile = Annotated[
    Path | None, typer.Option("--json", help="Also write the result to this file.")
]


@app.command()
def train(
    recipe: Annotated[str | None, typer.Argument(help="A recipe in YAML.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="key.sub=value ...")] = None,
    out: Annotated[Path | None, typer.Option(help="The run folder (default: runs/<time>).")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with this run folder.")] = None,
) -> None:
    """Train a reward model as a recipe says, and export it once others can load it."""
    from hafrm.config import load_recipe  # noqa: PLC0415
    from hafrm.errors import ConfigError  # noqa: PLC0415

    if resume is not None:
        if recipe is not None and "=" in recipe:  # the first override stands where a recipe would
            overrides = [recipe, *(overrides or ())]
            recipe = None
        recipe, folder = recipe or str(resume / "recipe.yaml"), resume
    elif recipe is None:
        raise ConfigError("hafrm train needs a recipe, or --resume with a run folder")
    else:
        folder = out or Path("runs") / datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
    loaded = load_recipe(recipe, overrides or ())
    from hafrm.training import loop, parallel  # noqa: PLC0415

    try:
        result = loop.train(loaded, folder, resume=resume is not None)
        if not parallel.is_main():
            return
        typer.echo(
            f"trained {result.num_steps} steps; exported step {result.best_step} of {folder}"
        )
        typer.echo(f"  validation: {in_words(result.best)}")
        if loaded.data.test:
            _evaluate(folder, list(loaded.data.test), json_file=folder / "test.json")
        typer.echo(f"use it:  hafrm evaluate {folder} DATA...   hafrm score {folder} IN OUT")
    finally:
        parallel.stop()


@app.command()
def plan(
    recipe: Annotated[str, typer.Argument(help="A recipe in YAML.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.sub=value ...")] = None,
    memory: Annotated[
        float | None,
        typer.Option(help="GiB of each GPU (default: this machine's GPU, or its share of RAM)."),
    ] = None,
    ranks: Annotated[int, typer.Option(help="Processes that share a step.", min=1)] = 1,
) -> None:
    """The memory that a recipe will need, before anything is loaded; exit code 1 where it does not fit."""
    from hafrm.config import load_recipe  # noqa: PLC0415

    loaded = load_recipe(recipe, overrides or ())
    from hafrm.tables import plan_tables  # noqa: PLC0415
    from hafrm.training.budget import plan_recipe  # noqa: PLC0415
    from hafrm.training.loop import resolve_method  # noqa: PLC0415

    found, remedies = plan_recipe(loaded, resolve_method(loaded), memory=memory, ranks=ranks)
    show_tables(plan_tables(found, remedies))
    if not found.fits:
        raise typer.Exit(1)


@app.command()
def evaluate(  # noqa: PLR0913
    model: Annotated[str, typer.Argument(help="Run folder, or a reward or policy directory.")],
    data: OptionalSources = None,
    *,
    benchmark: Annotated[
        list[str] | None, typer.Option(help="A published benchmark, such as rewardbench2; or all.")
    ] = None,
    benchmark_data: Annotated[
        Path | None, typer.Option(help="The folder with its files, if not from the hub.")
    ] = None,
    also: Annotated[list[str] | None, typer.Option(help="Another seed of MODEL.")] = None,
    against: Annotated[
        list[str] | None, typer.Option(help="A model to compare MODEL with, pair by pair.")
    ] = None,
    json_file: JsonFile = None,
    policy: Annotated[Path | None, typer.Option(help="Also judge by this policy.")] = None,
    reference: Annotated[
        str | None, typer.Option(help="The policy's reference, if not the one it names.")
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(help="Cut longer inputs to this many tokens (default: the model's)."),
    ] = None,
) -> None:
    """Pairwise accuracy with 95 % intervals, calibration, length bias, and the baselines beside them.

    On preferences (DATA) or on published benchmarks; alone, or compared with other models.
    """
    _evaluate(
        model,
        data or [],
        json_file=json_file,
        benchmark=benchmark or (),
        benchmark_data=benchmark_data,
        also=also or (),
        against=against or (),
        policy=policy,
        reference=reference,
        max_length=max_length,
    )


def _evaluate(
    model: str | Path, data: list[str], *, json_file: Path | None, **options: Any
) -> None:
    from hafrm.evaluation.verb import run_evaluation  # noqa: PLC0415
    from hafrm.tables import result_tables  # noqa: PLC0415

    with show_count("scoring responses") as done:
        result = run_evaluation(model, data, done=done, **options)
    show_tables(result_tables(result))
    write_json(json_file, result.to_dict())


@app.command()
def score(  # noqa: PLR0913 - the verb and its options
    model: Annotated[str, typer.Argument(help="Run folder or reward directory.")],
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Rows with prompt and response(s): files (.jsonl .parquet .json .csv, .gz), folders "
            "of them, file#split=test, hub:name:split."
        ),
    ],
    out: Annotated[
        Path,
        typer.Argument(help="The same rows with scores: .jsonl, .jsonl.gz, .parquet or a folder."),
    ],
    *,
    rows_per_shard: Annotated[
        int, typer.Option(help="Rows that a kill can cost; more become several shards.")
    ] = ROWS_PER_SHARD,
    processes: Annotated[
        int | None, typer.Option(help="On this machine (default: one for each GPU, or one).")
    ] = None,
    shard: Annotated[
        str, typer.Option(help="Of a job array: score only part i of n, i from 0 to n - 1.")
    ] = "0/1",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    max_length: Annotated[
        int | None, typer.Option(help="Tokens of prompt and response (default: the model's limit).")
    ] = None,
    cut: Annotated[
        bool, typer.Option("--cut", help="Cut longer inputs instead of leaving them unscored.")
    ] = False,
) -> None:
    """Add the model's reward to every row, order kept. Called again, it goes on where it was ended."""
    from hafrm.errors import ModelError  # noqa: PLC0415
    from hafrm.evaluation.evaluate import find_heads  # noqa: PLC0415
    from hafrm.scoring.bulk import BulkOptions, parse_part, score_files  # noqa: PLC0415

    options = BulkOptions(rows_per_shard, max_length, cut, dtype, processes, parse_part(shard))
    reward = find_heads(model).reward
    if reward is None:
        raise ModelError(f"{model} has no reward model (a policy alone scores by `hafrm evaluate`)")
    with show_pace() as watch:
        result = score_files(reward, sources, out, options, watch)
    typer.echo(
        f"scored {result.num_responses} responses in {result.num_rows} rows, "
        f"{result.num_bad} of them not scored (see their `error`): {out}"
    )
    if result.num_kept:
        typer.echo(f"{result.num_kept} shards were finished before and are kept")
    if result.num_cut:
        typer.echo(f"{result.num_cut} prompts and responses were cut")
    if result.bad_rows is not None:
        typer.echo(f"rows without a score are listed with reasons: {result.bad_rows}")


@app.command()
def data(
    sources: Sources,
    *,
    json_file: JsonFile = None,
    model: Annotated[
        str | None, typer.Option(help="Also count tokens with this model's tokenizer.")
    ] = None,
    max_length: Annotated[int, typer.Option(help="Length policy for the token counts.")] = 1024,
) -> None:
    """What preference data holds, what is wrong with it, its lengths and its length bias."""
    from hafrm.data.describe import describe  # noqa: PLC0415
    from hafrm.data.readers import read  # noqa: PLC0415
    from hafrm.tables import data_tables  # noqa: PLC0415

    reading = read(sources, max_bad_fraction=1.0)
    encoder = None
    if model is not None:
        from transformers import AutoTokenizer  # noqa: PLC0415

        from hafrm.data.encoding import Encoder  # noqa: PLC0415

        encoder = Encoder(AutoTokenizer.from_pretrained(model), max_length=max_length)
    description = describe(reading, None if encoder is None else encoder.encode)
    show_tables(data_tables(description))
    write_json(json_file, description.to_dict())


@app.command()
def split(
    sources: Sources,
    *,
    to: Annotated[Path, typer.Option(help="The folder for train.jsonl and test.jsonl.")],
    fraction: Annotated[float, typer.Option(help="Of the prompts, for the test part.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Another seed, another split.")] = 0,
) -> None:
    """Split preference data by prompt, so that no prompt is on both sides."""
    from hafrm.data.mixing import split_by_prompt  # noqa: PLC0415
    from hafrm.data.readers import read  # noqa: PLC0415
    from hafrm.data.writing import write_groups  # noqa: PLC0415

    reading = read(sources, bad_rows_file=to / "bad_rows.jsonl")
    for name, part in zip(
        ("train", "test"), split_by_prompt(reading.groups, fraction, seed), strict=True
    ):
        rows = write_groups(part, to / f"{name}.jsonl")
        typer.echo(f"{to / name}.jsonl: {rows} comparisons of {len(part)} groups")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where its runs go.")] = Path("demo-run"),
) -> None:
    """Train HAF, BT and DPO on a made-up preference world and compare them, in a few minutes."""
    from hafrm.demo.demo import run, tables  # noqa: PLC0415

    show_tables(tables(run(out, tell=lambda text: typer.echo(text, err=True))))


if __name__ == "__main__":
    main()
