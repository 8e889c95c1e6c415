"""Tables of what preference data holds, for the terminal."""

from collections.abc import Iterator

from rich.console import RenderableType
from rich.table import Table

from hafrm.data.describe import Description


def data_tables(description: Description) -> Iterator[RenderableType]:
    """The description's tables."""
    for table in description.tables():
        named = any(column.name for column in table.columns)
        shown = Table(title=table.title, title_justify="left", show_header=named)
        for column in table.columns:
            shown.add_column(column.name, justify="left" if column.kind == "text" else "right")
        for row in table.texts():
            shown.add_row(*row)
        yield shown
