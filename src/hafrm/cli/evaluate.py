"""The verb `evaluate`: how good a model is, and with --diagnose, why."""

from pathlib import Path
from typing import Annotated, Any

import typer

from hafrm.cli.entry import Device, Dtype, HasTables, JsonFile, OptionalSources, app, show_result
from hafrm.errors import ConfigError
from hafrm.progress import show_progress

DIAGNOSIS_FILE = "diagnostics.json"
"""In the run folder, where the report looks for it."""


@app.command("evaluate")
def evaluate_command(  # noqa: PLR0913 - the verb and its options
    model: Annotated[
        str, typer.Argument(help="Run folder, reward or policy directory; or NAME=PATH.")
    ],
    data: OptionalSources = None,
    *,
    also: Annotated[
        list[str] | None, typer.Option(help="Another model; one of MODEL's NAME is a seed of it.")
    ] = None,
    benchmark: Annotated[
        list[str] | None, typer.Option(help="Such as rewardbench2; all. DATA: a local folder.")
    ] = None,
    diagnose: Annotated[
        bool, typer.Option("--diagnose", help="Temperature, style, slices, labels, hidden states.")
    ] = False,
    json_file: JsonFile = None,
    max_length: Annotated[
        int | None,
        typer.Option(help="Cut longer inputs to this many tokens (default: the model's)."),
    ] = None,
    max_bad_fraction: Annotated[
        float, typer.Option(help="Of a source's rows, that may be left out as bad.", min=0, max=1)
    ] = 0.02,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Pairwise accuracy with 95 % intervals, calibration, length bias, and baselines.

    On preferences (DATA) or on published benchmarks; for one model, or compared with others. The findings
    of --diagnose are also written to MODEL/diagnostics.json if MODEL is a run folder.
    """
    if benchmark and (also or diagnose or len(data or ()) > 1):
        raise ConfigError(
            "--benchmark goes without --also and --diagnose; it takes one folder as DATA"
        )
    if not benchmark and not data:
        raise ConfigError("hafrm evaluate needs DATA, or --benchmark with a name")
    from hafrm.benchmarks.benchmark_run import run_benchmarks  # noqa: PLC0415
    from hafrm.diagnostics.model_runs import diagnose as diagnose_model  # noqa: PLC0415
    from hafrm.evaluation import compare_models, heads  # noqa: PLC0415
    from hafrm.evaluation import evaluate as evaluate_model  # noqa: PLC0415

    result: HasTables
    options = heads.EvaluationOptions(None, max_length, dtype, device, max_bad_fraction)
    sources = data or []
    (name, path), *others = map(_named, [model, *(also or ())])
    if diagnose and json_file is None and (Path(path) / "recipe.yaml").is_file():
        json_file = Path(path) / DIAGNOSIS_FILE
    with show_progress("scoring responses") as progress:
        run: dict[str, Any] = {"options": options, "on_progress": progress}
        if benchmark:
            folder = Path(sources[0]) if sources else None
            result = run_benchmarks(path, benchmark, folder=folder, **run)
        elif diagnose:
            result = diagnose_model(path, sources, also=[other for _, other in others], **run)
        elif also:
            seeds = [path, *(p for other, p in others if other and other == name)]
            rivals = [p for other, p in others if not (other and other == name)]
            result = compare_models(seeds, rivals, sources, **run)
        else:
            result = evaluate_model(path, sources, **vars(options), on_progress=progress)
    show_result(result, json_file)


def _named(text: str) -> tuple[str, str]:
    """(NAME, PATH) of NAME=PATH; an existing path may have "=" in it and has no name."""
    name, equals, path = text.partition("=")
    return (name, path) if equals and "/" not in name and not Path(text).exists() else ("", text)
