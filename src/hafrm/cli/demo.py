"""The verb `demo`."""

from pathlib import Path
from typing import Annotated

import typer

from hafrm.cli.entry import app
from hafrm.terminal import show_tables


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where its runs go.")] = Path("demo-run"),
) -> None:
    """Train HAF, BT and DPO on a made-up preference world and compare them, in a few minutes."""
    from hafrm.demo.demo import run, tables  # noqa: PLC0415

    show_tables(tables(run(out, tell=lambda text: typer.echo(text, err=True))))
