"""What people see: tables on standard output, progress of something long on standard error.

Progress is a line that changes on a terminal, and lines in a log elsewhere. rich is loaded when it is used.
"""

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType


@contextmanager
def show_count(what: str) -> Iterator[Callable[[int, int], None]]:
    """A counter, given (how many more, tokens run for them); silent where it is no terminal."""
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn  # noqa: PLC0415

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description} {task.completed}"),
        TimeElapsedColumn(),
    )
    with Progress(
        *columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()
    ) as bar:
        task = bar.add_task(what, total=None)
        yield lambda more, _: bar.update(task, advance=more)


def show_tables(renderables: Iterable["RenderableType"]) -> None:
    """Tables and lines of text on standard output."""
    from rich.console import Console  # noqa: PLC0415

    # A file or a pipe has no width of its own; 80 columns would cut the tables.
    console = Console(width=None if sys.stdout.isatty() else 120)
    for renderable in renderables:
        console.print(renderable)


def write_json(file: Path | None, result: dict[str, Any]) -> None:
    """The result to a file too, where one was asked for."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
