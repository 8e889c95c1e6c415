"""The verb `score`: files of conversations in, the same with rewards out."""

from pathlib import Path
from typing import Annotated

import typer

from hafrm.bulk.shards import ROWS_PER_SHARD
from hafrm.cli.entry import Device, Dtype, app
from hafrm.errors import ModelError
from hafrm.progress import show_progress


@app.command("score")
def score_command(  # noqa: PLR0913 - the verb and its options
    model: Annotated[str, typer.Argument(help="Run folder or reward directory.")],
    sources: Annotated[
        list[str],
        typer.Argument(help="Files, folders, file#split=test, hub:name:split (docs/scoring.md)."),
    ],
    *,
    out: Annotated[Path, typer.Option(help="The folder for the same rows with scores.")],
    rows_per_shard: Annotated[
        int, typer.Option(help="Rows of an output file, the most that a kill can cost.", min=1)
    ] = ROWS_PER_SHARD,
    shard: Annotated[str, typer.Option(help="i/n: only part i of n, from 0 to n - 1.")] = "0/1",
    dtype: Dtype = "auto",
    device: Device = None,
    max_length: Annotated[
        int | None, typer.Option(help="Do not score longer rows (default: the model's limit).")
    ] = None,
) -> None:
    """Add the model's reward to every row, order kept. The same command resumes a job that was stopped."""
    from hafrm.bulk.bulk_job import RECORDS, BulkOptions, score_files  # noqa: PLC0415
    from hafrm.scoring.loading import find_heads  # noqa: PLC0415

    reward = find_heads(model).reward
    if reward is None:
        raise ModelError(f"{model} has no reward model (a policy alone scores by `hafrm evaluate`)")
    options = BulkOptions(rows_per_shard, max_length, dtype, device, shard)
    with show_progress("scoring rows") as on_progress:
        result = score_files(reward, sources, out, options, on_progress)
    typer.echo(
        f"scored {result.num_responses} responses in {result.num_rows} rows, "
        f"{result.num_bad} of them not scored (see their `error`): {out}"
    )
    if result.num_resumed:
        typer.echo(f"{result.num_resumed} shards were already finished")
    if result.num_bad:
        typer.echo(f"rows without a score are listed with reasons: {out / RECORDS}")
