"""What people see: tables on standard output, progress of something long on standard error.

Progress is a line that changes on a terminal, and lines in a log elsewhere. rich is loaded when it is used.
"""

import json
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

log = logging.getLogger("hafrm")

PACE_SECONDS = 30.0
"""Between two lines of progress where there is no terminal."""


@contextmanager
def show_pace() -> Iterator[Callable[[object], None]]:
    """What is given, as text: where it is no terminal, at most every PACE_SECONDS."""
    from rich.console import Console  # noqa: PLC0415

    console = Console(stderr=True)
    if console.is_terminal:
        with console.status("reading inputs, loading the model") as line:
            yield lambda pace: line.update(str(pace))
        return
    last = time.monotonic()

    def tell(pace: object) -> None:
        nonlocal last
        if time.monotonic() - last >= PACE_SECONDS:
            last = time.monotonic()
            log.info("%s", pace)

    yield tell


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
