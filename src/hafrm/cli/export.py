"""The verb `export`: writes a run's model in the form that other software loads."""

from pathlib import Path
from typing import Annotated

import typer

from hafrm.cli.entry import app


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
        bool | None,
        typer.Option(
            help="Of a LoRA run: whole weights (the default), or a PEFT adapter for its base model."
        ),
    ] = None,
    checkpoint: Annotated[str, typer.Option(help="best, latest or a step.")] = "best",
) -> None:
    """Write one head of a run as a directory that stock transformers loads, proved before it appears."""
    from hafrm.training.run_export import ExportOptions, export_from_run  # noqa: PLC0415

    options = ExportOptions("policy" if policy else "reward", dtype, merge_lora, checkpoint)
    done = export_from_run(run, out, options)
    lora = {None: "", True: ", LoRA merged", False: ", as an adapter"}[done.merged]
    typer.echo(f"exported the {done.head} model from {done.source} in {done.dtype}{lora}: {out}")
    what = "golden scores" if done.head == "reward" else "log-probs"
    typer.echo(
        f"plain transformers gives the same {done.num_golden} {what} (largest difference "
        f"{done.difference:.2g})"
    )
