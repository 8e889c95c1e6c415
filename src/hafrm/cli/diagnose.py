"""The verb `diagnose`: what is behind a reward model's accuracy."""

from pathlib import Path
from typing import Annotated

import typer

from hafrm.cli.entry import Device, Dtype, JsonFile, MaxBadFraction, MaxLength, Sources, app
from hafrm.terminal import show_count, show_tables, write_json

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

    Everything is written to MODEL/diagnostics.json where MODEL is a run folder, or to --json FILE.
    """
    from hafrm.atomic import atomic_write  # noqa: PLC0415
    from hafrm.evaluation.diagnostics.diagnose import diagnose as run  # noqa: PLC0415
    from hafrm.scoring.loading import Placement  # noqa: PLC0415
    from hafrm.tables.diagnostics import diagnosis_tables  # noqa: PLC0415

    place = Placement(dtype, device)
    with show_count("responses") as done:
        found = run(
            model,
            data,
            also=also or (),
            policy=policy,
            reference=reference,
            base=base,
            num_generations=generate,
            max_length=max_length,
            max_bad_fraction=max_bad_fraction,
            place=place,
            done=done,
        )
    show_tables(diagnosis_tables(found))
    if json_file is not None or not (Path(model) / "recipe.yaml").is_file():
        write_json(json_file, found.to_dict())
        return
    import json  # noqa: PLC0415

    file = Path(model) / FILE
    atomic_write(file, json.dumps(found.to_dict(), indent=1) + "\n")
    typer.echo(f"everything is in {file}")
