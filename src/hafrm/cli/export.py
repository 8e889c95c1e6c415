"""The verbs `export` and `verify`: a run's model as other software loads it, and whether that is so."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hafrm.cli.entry import JsonFile, app, show_result
from hafrm.errors import ConfigError

if TYPE_CHECKING:
    from hafrm.export.checklist import Verification
    from hafrm.export.reward_servers import ServerReplay


@app.command("export")
def export_command(
    run: Annotated[Path, typer.Argument(help="A run folder, finished or not.")],
    *,
    out: Annotated[Path, typer.Option(help="The directory to write; it must not exist.")],
    policy: Annotated[
        bool, typer.Option("--policy", help="The policy (a causal LM) instead of the reward model.")
    ] = False,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16 (default: the run's own).")
    ] = None,
    merge_lora: Annotated[
        bool | None, typer.Option(help="Of a LoRA run: merged (the default), or a PEFT adapter.")
    ] = None,
    checkpoint: Annotated[str, typer.Option(help="best, latest or a step.")] = "best",
) -> None:
    """Write one head of a run as a directory that stock transformers loads, proved before it appears."""
    from hafrm.training.run_export import ExportOptions, export_from_run  # noqa: PLC0415

    options = ExportOptions("policy" if policy else "reward", dtype, merge_lora, checkpoint)
    done = export_from_run(run, out, options)
    lora = {None: "", True: ", LoRA merged", False: ", as an adapter"}[done.merged]
    typer.echo(f"exported the {options.head} model from {done.source} in {done.dtype}{lora}: {out}")
    what = "golden scores" if options.head == "reward" else "log-probs"
    typer.echo(
        f"plain transformers gives the same {done.num_golden} {what} (largest difference "
        f"{done.difference:.2g})"
    )


@app.command("verify")
def verify_command(
    target: Annotated[
        str, typer.Argument(help="Any reward directory, a run folder, or a server's URL.")
    ],
    *,
    golden: Annotated[
        Path | None, typer.Option(help="A golden file or exported directory (default: its own).")
    ] = None,
    json_file: JsonFile = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Of max(1, |reward|) (default: 1e-4; a server: 1.5e-2).")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(help="A server's bearer token.", envvar="HAFRM_API_KEY")
    ] = None,
) -> None:
    """Check an export clause by clause, or replay its golden scores on a server; exit code 1 on failure."""
    options: dict[str, Any] = {} if tolerance is None else {"tolerance": tolerance}
    result: Verification | ServerReplay
    if target.startswith(("http://", "https://")):
        from hafrm.export.reward_servers import verify_server  # noqa: PLC0415

        if golden is None:
            raise ConfigError("a server needs golden scores: give --golden, an exported directory")
        result = verify_server(target, golden, api_key=api_key, **options)
    else:
        from hafrm.export.checklist import verify_directory  # noqa: PLC0415
        from hafrm.scoring.loading import head_directory  # noqa: PLC0415

        result = verify_directory(Path(head_directory(target, "reward")), golden, **options)
    show_result(result, json_file)
    if not result.ok:
        raise typer.Exit(1)
