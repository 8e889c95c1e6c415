"""Tables in Markdown, for model cards."""

from hafrm.table import Table


def markdown_table(table: Table) -> str:
    """The table in GitHub's Markdown, its notes below; the title is left to the caller's heading."""
    heading = [column.name for column in table.columns]
    rule = ["---" if column.kind == "text" else "---:" for column in table.columns]
    rows = [[_cell(text) for text in row] for row in table.texts()]
    lines = [_line(list(map(_cell, heading))), _line(rule), *map(_line, rows)]
    lines += [line for note in table.notes for line in ("", _escaped(note))]
    return "\n".join(lines) + "\n"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(text: str) -> str:
    # a bar would end the cell, a line break the row
    return " ".join(_escaped(text).replace("|", "\\|").split())


def _escaped(text: str) -> str:
    """The text with what Markdown and HTML would read as markup made plain."""
    for mark in ("\\", "`", "*", "_", "<"):
        text = text.replace(mark, "\\" + mark)
    return text
