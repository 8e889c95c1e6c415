"""What people see: tables on standard output, progress of something long on standard error.

Progress is a line that changes on a terminal, and lines in a log elsewhere. rich is loaded when it is used.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType


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
