"""The entry of the command line: the app that verbs join, how errors end it, arguments they share."""

import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Protocol, runtime_checkable

import typer

from hafrm.errors import HafrmError
from hafrm.table import Table

STOPPED = 143

app = typer.Typer(
    name="hafrm",
    help="Train, evaluate and use reward models that keep their language-model head.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line; hafrm's own errors become one message and an exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("hafrm").setLevel(logging.INFO)
    # transformers shows a bar for every shard that it loads or writes; ours say enough.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app()
    except HafrmError as error:
        typer.secho(f"{type(error).__name__}: {error}", fg="red", err=True)
        sys.exit(STOPPED if type(error).__name__ == "StoppedError" else 1)


_SOURCES = typer.Argument(
    help="Files (.json .jsonl .csv .parquet, .gz), file#split=test, hub:name:split, set:name."
)
Sources = Annotated[list[str], _SOURCES]
OptionalSources = Annotated[list[str] | None, _SOURCES]
MaxLength = Annotated[
    int | None, typer.Option(help="Cut longer inputs to this many tokens (default: the model's).")
]
MaxBadFraction = Annotated[
    float, typer.Option(help="Of a source's rows, that may be left out as bad.", min=0, max=1)
]
Dtype = Annotated[
    str,
    typer.Option(
        help="float32, bfloat16 or float16; auto: the checkpoint's on a GPU, float32 on a CPU."
    ),
]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda or cuda:1 (default: a GPU where there is one).")
]
JsonFile = Annotated[
    Path | None, typer.Option("--json", help="Also write the result to this file.")
]


@runtime_checkable
class HasTables(Protocol):
    """A result that people see."""

    def tables(self) -> tuple[Table, ...]:
        """What it shows."""


def show_result(result: HasTables, json_file: Path | None = None) -> None:
    """Print the result's tables, and write `json_file` if one is given."""
    from hafrm.report.terminal import print_tables  # noqa: PLC0415
    from hafrm.results import write_result  # noqa: PLC0415

    print_tables(result.tables())
    if json_file is not None:
        write_result(json_file, result)
