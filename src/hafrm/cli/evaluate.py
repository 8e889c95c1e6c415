"""The verb `evaluate`: how good a model is, and with --diagnose, why."""

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

DIAGNOSIS_FILE = "diagnostics.json"
"""In the run folder, where the report looks for it."""


@app.command("evaluate")
def evaluate_command(  # noqa: PLR0913 - the verb and its options
    model: Annotated[
        str,
        typer.Argument(help="Run folder, reward or policy directory; or NAME=PATH."),
    ],
    data: OptionalSources = None,
    *,
    also: Annotated[
        list[str] | None,
        typer.Option(help="Another model to compare with; one of MODEL's NAME is a seed of it."),
    ] = None,
    benchmark: Annotated[
        list[str] | None,
        typer.Option(
            help="Such as rewardbench2; or all. DATA: the folder of files not from the hub."
        ),
    ] = None,
    diagnose: Annotated[
        bool,
        typer.Option(
            "--diagnose", help="Temperature, style, slices, labels, hidden states, errors."
        ),
    ] = False,
    json_file: JsonFile = None,
    max_length: MaxLength = None,
    max_bad_fraction: MaxBadFraction = 0.02,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Pairwise accuracy with 95 % intervals, calibration, length bias, and baselines.

    On preferences (DATA) or on published benchmarks; for one model, or compared with others. The findings
    of --diagnose are also written to MODEL/diagnostics.json if MODEL is a run folder.
    """
    for is_wrong, message in (
        (benchmark and (also or diagnose), "--benchmark goes without --also and --diagnose"),
        (not benchmark and not data, "hafrm evaluate needs DATA, or --benchmark with a name"),
        (benchmark and len(data or ()) > 1, "--benchmark takes one folder as DATA"),
    ):
        if is_wrong:
            raise ConfigError(message)
    from hafrm.benchmarks.benchmark_run import run_benchmarks  # noqa: PLC0415
    from hafrm.diagnostics.model_runs import diagnose as diagnose_model  # noqa: PLC0415
    from hafrm.evaluation import compare_models, heads  # noqa: PLC0415
    from hafrm.evaluation import evaluate as evaluate_model  # noqa: PLC0415

    result: HasTables
    how: dict[str, Any] = {"max_length": max_length, "dtype": dtype, "device": device}
    options = heads.EvaluationOptions(**how, max_bad_fraction=max_bad_fraction)
    (name, path), *others = map(_named, [model, *(also or ())])
    if diagnose and json_file is None and (Path(path) / "recipe.yaml").is_file():
        json_file = Path(path) / DIAGNOSIS_FILE
    with show_progress("scoring responses") as progress:
        how |= {"on_progress": progress}
        if benchmark:
            folder = Path(data[0]) if data else None
            result = run_benchmarks(
                path, benchmark, folder=folder, options=options, on_progress=progress
            )
        elif diagnose:
            also = [other for _, other in others]
            result = diagnose_model(
                path, data or (), also=also, options=options, on_progress=progress
            )
        elif also:
            seeds = [path, *(p for other, p in others if other and other == name)]
            rivals = [p for other, p in others if not (other and other == name)]
            result = compare_models(
                seeds, rivals, data or (), options=options, on_progress=progress
            )
        else:
            result = evaluate_model(path, data or (), max_bad_fraction=max_bad_fraction, **how)
    show_result(result, json_file)


def _named(text: str) -> tuple[str, str]:
    """(NAME, PATH) of NAME=PATH; an existing path may have "=" in it and has no name."""
    name, equals, path = text.partition("=")
    return (name, path) if equals and "/" not in name and not Path(text).exists() else ("", text)
