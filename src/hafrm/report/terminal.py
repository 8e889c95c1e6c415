"""Tables on standard output."""

import sys
from collections.abc import Iterable
from typing import Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table as RichTable
from rich.text import Text

from hafrm.results import Table
from hafrm.statistics import Estimate

FILE_WIDTH = 120
"""Width for a file or a pipe, which has none of its own; rich's 80 columns would cut tables."""


def print_tables(tables: Iterable[Table], console: Console | None = None) -> None:
    """Print each table with its title above and its notes below."""
    console = console or Console(width=None if sys.stdout.isatty() else FILE_WIDTH)
    for table in tables:
        rendered = _to_rich(table, is_stacked=False)
        options = console.options.update(max_width=10 * console.width)
        if Measurement.get(console, options, rendered).maximum > console.width:
            rendered = _to_rich(table, is_stacked=True)
        console.print(rendered)
        for note in table.notes:
            console.print(Text(note))
        console.print()


def _to_rich(table: Table, *, is_stacked: bool) -> RichTable:
    """The table in rich's form; stacked, each interval is on a line below its value."""
    title = Text(table.title, style="italic")
    result = RichTable(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    result.padding = (0, 1, 0, 0)
    result.show_header = any(column.name for column in table.columns)
    for column in table.columns:
        is_text = column.kind == "text"
        # headings and intervals must not be broken; text may be
        name = column.name if is_text or not is_stacked else column.name.replace(" ", "\n")
        side: Literal["left", "right"] = "left" if is_text else "right"
        result.add_column(Text(name), justify=side, no_wrap=not is_text, overflow="fold")
    for cells, texts in zip(table.rows, table.texts(), strict=True):
        lines = (
            text.replace(" [", "\n[").replace(", ", ",")
            if is_stacked and isinstance(cell, Estimate)
            else text
            for cell, text in zip(cells, texts, strict=True)
        )
        result.add_row(*map(Text, lines))
    return result
