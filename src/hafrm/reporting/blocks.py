"""What a page is made of: sections of figures, tables, text and passages to read. Data only.

The template turns them into HTML and escapes every text; only `Markup` goes through as it is, and only
`strips` and `drawing` make it.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from markupsafe import Markup


@dataclass(frozen=True)
class Figure:
    """A plot: its title is read above it, its words stand in for it where it cannot be seen."""

    title: str
    svg: Markup
    """What is inside the svg element."""
    size: tuple[float, float]
    alt: str
    unit: str = ""


@dataclass(frozen=True)
class Panels:
    """Plots side by side, with one key for all of them."""

    kind: ClassVar[str] = "panels"
    figures: tuple[Figure, ...]
    key: tuple[tuple[str, int], ...] = ()
    """Names with their colours; shown where there are several."""
    note: str = ""


@dataclass(frozen=True)
class Cell:
    """One cell: a text, perhaps a smaller one under it, or a strip of a plot."""

    text: str = ""
    note: str = ""
    strip: Markup | None = None
    heat: float | None = None
    """A share, whose distance from a half colours the cell."""
    is_strong: bool = False
    is_framed: bool = False
    colour: int | None = None
    """The colour of the run or method that the text names."""


@dataclass(frozen=True)
class Column:
    """A column's heading."""

    title: str
    kind: Literal["word", "number", "strip", "heat"] = "number"
    axis: Markup | None = None


@dataclass(frozen=True)
class Rows:
    """Rows that belong together, under a title of their own; the first cell of a row names it."""

    rows: tuple[tuple[Cell, ...], ...]
    title: str = ""


@dataclass(frozen=True)
class Table:
    """A table that scrolls in a box of its own where it is too wide."""

    kind: ClassVar[str] = "table"
    caption: str
    columns: tuple[Column, ...]
    groups: tuple[Rows, ...]
    note: str = ""


@dataclass(frozen=True)
class Beside:
    """Small tables that stand side by side where there is room, with one note for all."""

    kind: ClassVar[str] = "beside"
    tables: tuple[Table, ...]
    note: str = ""


@dataclass(frozen=True)
class Text:
    """Paragraphs."""

    kind: ClassVar[str] = "text"
    paragraphs: tuple[str, ...]


@dataclass(frozen=True)
class Points:
    """A list of sentences."""

    kind: ClassVar[str] = "points"
    title: str
    items: tuple[str, ...]


@dataclass(frozen=True)
class Headline:
    """The number that matters."""

    kind: ClassVar[str] = "headline"
    value: str
    interval: str
    label: str


@dataclass(frozen=True)
class Passage:
    """Something to read: a line that tells what it is, then labelled texts."""

    title: str
    note: str
    texts: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Passages:
    """Passages that open one by one."""

    kind: ClassVar[str] = "passages"
    title: str
    passages: tuple[Passage, ...]


@dataclass(frozen=True)
class Facts:
    """Terms and what they are here."""

    kind: ClassVar[str] = "facts"
    items: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Listing:
    """Text in its own lines, such as a recipe."""

    kind: ClassVar[str] = "listing"
    text: str


@dataclass(frozen=True)
class More:
    """What is shown when asked for."""

    kind: ClassVar[str] = "more"
    title: str
    blocks: "tuple[Block, ...]"
    is_open: bool = False


Block = Panels | Table | Beside | Text | Points | Headline | Passages | Facts | Listing | More


@dataclass(frozen=True)
class Section:
    """A part of the page, with a sentence on how to read it."""

    key: str
    """Its anchor."""
    title: str
    lead: str
    blocks: tuple[Block, ...]


def words(text: str, note: str = "", colour: int | None = None) -> Cell:
    """A cell that names something."""
    return Cell(text, note, colour=colour)
