"""The verb `demo`."""

from pathlib import Path
from typing import Annotated

import typer

from hafrm.cli.entry import app


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
