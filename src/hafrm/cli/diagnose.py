"""The verb `diagnose`: what is behind a reward model's accuracy."""

from pathlib import Path
from typing import Annotated

import typer

from hafrm.cli.entry import (
    Device,
    Dtype,
    JsonFile,
    MaxBadFraction,
    MaxLength,
    Sources,
    app,
    show_result,
)
from hafrm.progress import show_progress

FILE = "diagnostics.json"
"""In the run folder, where the report looks for it."""


@app.command()
def diagnose(  # noqa: PLR0913
    model: Annotated[str, typer.Argument(help="Run folder, or a reward or policy directory.")],
    data: Sources,
    *,
    json_file: JsonFile = None,
    also: Annotated[
        list[str] | None,
        typer.Option(help="Another seed or method, to audit labels and to compare with."),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(help="The model that training began with (default: a run folder's own)."),
    ] = None,
    policy: Annotated[
        Path | None, typer.Option(help="The policy, if not the one beside MODEL's reward.")
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="The policy's reference, if not the one it names.")
    ] = None,
    generate: Annotated[
        int, typer.Option(help="Let all policies write on so many prompts, and score it.", min=0)
    ] = 0,
    max_length: MaxLength = None,
    max_bad_fraction: MaxBadFraction = 0.02,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Calibration, style bias, slices, label noise, representations, and the comparisons to read.

    All results are written to MODEL/diagnostics.json if MODEL is a run folder, or to --json FILE.
    """
    from hafrm.diagnostics.model_runs import diagnose as run  # noqa: PLC0415

    with show_progress("scoring responses") as on_progress:
        result = run(
            model,
            data,
            also=also or (),
            policy=policy,
            reference=reference,
            base=base,
            num_generations=generate,
            max_length=max_length,
            dtype=dtype,
            device=device,
            max_bad_fraction=max_bad_fraction,
            on_progress=on_progress,
        )
    if json_file is None and (Path(model) / "recipe.yaml").is_file():
        json_file = Path(model) / FILE
    show_result(result, json_file)
    if json_file is not None:
        typer.echo(f"all results: {json_file}")
