"""The verb `evaluate`: how good a model is."""

from pathlib import Path
from typing import Annotated, Any

import typer

from hafrm.cli.entry import Device, Dtype, JsonFile, MaxBadFraction, MaxLength, OptionalSources, app
from hafrm.terminal import show_count, show_tables, write_json


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
    max_length: MaxLength = None,
    max_bad_fraction: MaxBadFraction = 0.02,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Pairwise accuracy with 95 % intervals, calibration, length bias, and the baselines beside them.

    On preferences (DATA) or on published benchmarks; alone, or compared with other models.
    """
    from hafrm.scoring.loading import Placement  # noqa: PLC0415

    show_evaluation(
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
        max_bad_fraction=max_bad_fraction,
        place=Placement(dtype, device),
    )


def show_evaluation(
    model: str | Path, data: list[str], *, json_file: Path | None, **options: Any
) -> None:
    """Evaluate as the verb does, print the tables, and write `json_file` where one is given."""
    from hafrm.evaluation.verb import run_evaluation  # noqa: PLC0415
    from hafrm.tables.results import result_tables  # noqa: PLC0415

    with show_count("scoring responses") as done:
        result = run_evaluation(model, data, done=done, **options)
    show_tables(result_tables(result))
    write_json(json_file, result.to_dict())
