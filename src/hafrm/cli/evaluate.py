"""The verb `evaluate`: how good a model is."""

from pathlib import Path
from typing import Annotated, Any

import typer

from hafrm.cli.entry import (
    Device,
    Dtype,
    HasTables,
    JsonFile,
    MaxBadFraction,
    MaxLength,
    OptionalSources,
    app,
    show_result,
)
from hafrm.errors import ConfigError
from hafrm.progress import show_progress


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
    policy: Annotated[Path | None, typer.Option(help="Also score with this policy.")] = None,
    reference: Annotated[
        str | None, typer.Option(help="The policy's reference, if not the one it names.")
    ] = None,
    max_length: MaxLength = None,
    max_bad_fraction: MaxBadFraction = 0.02,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Pairwise accuracy with 95 % intervals, calibration, length bias, and baselines.

    On preferences (DATA) or on published benchmarks; for one model, or compared with others.
    """
    _check_options(data, benchmark, benchmark_data, also or against, policy or reference)
    from hafrm.benchmarks.benchmark_run import run_benchmarks  # noqa: PLC0415
    from hafrm.evaluation import compare_models  # noqa: PLC0415
    from hafrm.evaluation import evaluate as evaluate_model  # noqa: PLC0415

    result: HasTables
    how: dict[str, Any] = {"max_length": max_length, "dtype": dtype, "device": device}
    heads: dict[str, Any] = {"policy": policy, "reference": reference}
    with show_progress("scoring responses") as on_progress:
        how["on_progress"] = on_progress
        if benchmark:
            result = run_benchmarks(model, benchmark, folder=benchmark_data, **heads, **how)
        elif also or against:
            models = [model, *(also or ())]
            how["max_bad_fraction"] = max_bad_fraction
            result = compare_models(models, against or (), data or (), **how)
        else:
            how["max_bad_fraction"] = max_bad_fraction
            result = evaluate_model(model, data or (), **heads, **how)
    show_result(result, json_file)


def _check_options(
    data: object, benchmark: object, benchmark_data: object, others: object, head: object
) -> None:
    """Refuse combinations in which an option would be ignored."""
    for is_wrong, message in (
        (benchmark and (data or others), "--benchmark has its own data: leave DATA and others out"),
        (not benchmark and benchmark_data, "--benchmark-data needs --benchmark with a name"),
        (not benchmark and not data, "hafrm evaluate needs DATA, or --benchmark with a name"),
        (others and head, "--also and --against score each model by its own main head"),
    ):
        if is_wrong:
            raise ConfigError(message)
