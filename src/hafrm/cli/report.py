"""The verbs `report` and `demo`: one page about runs and results, and a small world to see it all in."""

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


@app.command("demo")
def demo_command(
    out: Annotated[Path, typer.Option(help="Folder for its data, runs and report.")] = Path(
        "demo-run"
    ),
) -> None:
    """Train HAF, BT and DPO on a made-up preference world and compare them, in a few minutes."""
    from hafrm.demo.run_demo import NEXT_STEPS, run_demo  # noqa: PLC0415
    from hafrm.report.terminal import print_tables  # noqa: PLC0415

    result = run_demo(out, on_stage=lambda text: typer.echo(text, err=True))
    print_tables([result.table()])
    page = result.report or "pip install 'hafrm[report]', then hafrm report on its folders"
    typer.echo(f"\nCurves, calibration and texts on one page: {page}\n{NEXT_STEPS}")
