"""The entry point of the command line: the app with its verbs, error handling, shared arguments."""

import logging
import os
import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated, Protocol, runtime_checkable

import typer
from typer import Argument, Option

from hafrm.atomic import check_writable
from hafrm.errors import ConfigError, HafrmError
from hafrm.results import Table, write_result
from hafrm.run_folder import describe_process, hide_secrets

app = typer.Typer(
    name="hafrm",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo("\n".join(map(" ".join, describe_process()["versions"].items())))
        raise typer.Exit


@app.callback()
def _root(
    _: Annotated[bool, Option("--version", is_eager=True, callback=_show_version)] = False,
) -> None:
    """Train, evaluate and use reward models that can keep their language-model head."""


class _Stderr(logging.Handler):
    """Writes to the current sys.stderr: a progress line replaces it, to stay below the log."""

    def emit(self, record: logging.LogRecord) -> None:
        typer.echo(self.format(record), err=True)


def main() -> None:
    """Run the command line; hafrm's own errors become one message and an exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[_Stderr()])
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("hafrm").setLevel(logging.INFO)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # warns about an unneeded kernel
    for library in ("huggingface_hub", "datasets"):  # their own handlers print each warning already
        logging.getLogger(library).propagate = False
    # transformers shows a progress bar for every shard that it loads or writes; ours are enough.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app()
    except HafrmError as error:
        typer.secho(hide_secrets(f"{type(error).__name__}: {error}"), fg="red", err=True)
        sys.exit(143 if type(error).__name__ == "StoppedError" else 1)
    except OSError as error:  # from the operating system: a missing file, a full disk
        place = f"{error.filename}: " if error.filename is not None else ""
        typer.secho(f"stopped: {place}{error.strerror or error}", fg="red", err=True)
        sys.exit(1)


_SOURCES = Argument(help="Files (JSON(L), CSV, Parquet), file#split=test, hub:name:split, set:name")
Sources = Annotated[list[str], _SOURCES]
OptionalSources = Annotated[list[str] | None, _SOURCES]
Dtype = Annotated[str, Option(help="float32, bfloat16, float16; auto: as stored (CPU: float32)")]
Device = Annotated[str | None, Option(help="cpu, cuda or cuda:1 (default: a GPU if there is one).")]


def _check_json(path: Path | None) -> Path | None:
    if path is not None:
        check_writable(path)
    return path


_JSON = Option("--json", help="Also write the result to this file.", callback=_check_json)
JsonFile = Annotated[Path | None, _JSON]
Recipe = Annotated[str | None, Argument(help="A recipe in YAML.")]
RecipeFile = Annotated[str, Argument(help="A recipe in YAML.")]
Overrides = Annotated[list[str] | None, Argument(help="key.sub=value ...")]
Out = Annotated[Path | None, Option(help="The run folder (default: runs/<time>).")]
Resume = Annotated[Path | None, Option(help="Resume this run folder.")]
Processes = Annotated[int | None, Option(help="Parallel runs (default: one per GPU).", min=1)]


@runtime_checkable
class HasTables(Protocol):
    """A result that can be shown as tables."""

    def tables(self) -> tuple[Table, ...]:
        """The tables to print."""


def parse_run(
    recipe: str | None, overrides: list[str] | None, out: Path | None, resume: Path | None
) -> tuple[str, list[str], Path]:
    """(recipe, overrides, run folder), from the arguments of `train` and `rlhf`."""
    changes = overrides or []
    if resume is None:
        if recipe is None:
            raise ConfigError("this needs a recipe, or --resume with a run folder")
        if out is None:
            out = Path("runs") / f"{datetime.now().astimezone():%Y%m%d-%H%M%S}"
            if os.environ.get("RANK", "0") == "0":  # once for all processes of a torchrun
                typer.echo(f"run folder: {out}", err=True)
        return recipe, changes, out
    if out is not None:
        raise ConfigError(f"--resume {resume} continues in that folder; leave out --out {out}")
    # the first override is then parsed as the recipe
    if recipe is not None and "=" in recipe:
        changes, recipe = [recipe, *changes], None
    return recipe or str(resume / "recipe.yaml"), changes, resume


def show_result(result: HasTables, *json_files: Path | None) -> None:
    """Print the result's tables, and write the result to the given JSON files."""
    from hafrm.report.terminal import print_tables  # noqa: PLC0415

    print_tables(result.tables())
    for file in json_files:
        if file is not None:
            # a run keeps the last result of each kind, and the report reads that
            done = "replaced" if file.exists() else "written"
            write_result(file, result)
            typer.echo(f"{file} {done}", err=True)
