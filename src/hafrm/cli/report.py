"""The verb `report`: one page about runs and results."""

from pathlib import Path
from typing import Annotated

import typer

from hafrm.cli.entry import app


@app.command("report")
def report_command(
    folders: Annotated[
        list[Path],
        typer.Argument(help="Run folders, and outputs of compare, best-of-n, rlhf."),
    ],
    out: Annotated[Path, typer.Option("--out", help="The page.")] = Path("report.html"),
) -> None:
    """One self-contained page: summary, curves, accuracy with intervals, texts to read, provenance."""
    from hafrm.report.page import write_report  # noqa: PLC0415

    size = write_report(folders, out)
    typer.echo(f"{out}: {size / 1000:.0f} kB")
