"""Tables on the terminal."""

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table as RichTable

from hafrm.table import Table


def print_tables(tables: Iterable[Table]) -> None:
    """Print tables and their notes on standard output."""
    console = Console(width=120)
    for table in tables:
        rich = RichTable(title=table.title, title_justify="left")
        for i, column in enumerate(table.columns):
            rich.add_column(column.name, justify="right" if i else "left")
        for row in table.texts():
            rich.add_row(*row)
        console.print(rich)
        for note in table.notes:
            console.print(note)
