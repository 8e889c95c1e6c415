"""What a page is made of, and its HTML: sections of tables, plots and text, drawn by page.html.j2.

Every text is escaped by the template; only `plots` makes `Markup`.
"""

import functools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.ticker import MaxNLocator

from hafrm.report.plots import HEIGHT, WIDTH, Plot
from hafrm.results import Cell, Table
from hafrm.statistics import Estimate

MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Strips:
    """A table with an interval strip after one of its columns: a dot with whiskers on a shared axis."""

    table: Table
    column: str
    reference: float = 0.5  # where every row shows a line


@dataclass(frozen=True)
class Plots:
    """Plots side by side, with one key for all of them."""

    plots: tuple[Plot, ...]
    key: tuple[tuple[str, int], ...] = ()  # names with their colours, if there are several
    note: str = ""


def drawn(
    plots: Iterable[Plot | None], key: tuple[tuple[str, int], ...] = (), note: str = ""
) -> tuple[Plots, ...]:
    """The plots that have something to draw, as one block; no block if there are none."""
    shown = tuple(plot for plot in plots if plot is not None)
    return (Plots(shown, key, note),) if shown else ()


@dataclass(frozen=True)
class Text:
    """Labelled texts: a headline and what it means, passages, points under a title, or a file."""

    texts: tuple[tuple[str, str], ...]
    kind: Literal["headline", "passages", "points", "file"] = "passages"


@dataclass(frozen=True)
class Details:
    """Blocks that are shown once this is opened."""

    title: str
    blocks: "tuple[Block, ...]"
    note: str = ""
    is_open: bool = False


Block = Table | Strips | Plots | Text | Details


@dataclass(frozen=True)
class PageSection:
    """A part of the page, with a sentence on how to read it."""

    key: str  # its anchor
    title: str
    lead: str
    blocks: tuple[Block, ...]


def render_page(
    sections: Sequence[PageSection], *, names: Sequence[str], by: str, colours: Mapping[str, int]
) -> str:
    """The page as HTML; a cell whose text is in `colours` gets a dot of that colour."""
    environment = Environment(
        loader=PackageLoader("hafrm.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["typeset"] = typeset
    environment.filters["kind"] = lambda block: type(block).__name__
    template = environment.get_template("page.html.j2")
    lay_out = functools.partial(_lay_out, colours=colours)
    return template.render(
        sections=sections, names=names, by=by, lay_out=lay_out, size=(WIDTH, HEIGHT)
    )


def typeset(text: str) -> str:
    """A sentence with minus signs before negative numbers, and no line break before a per cent sign."""
    return re.sub(r"(?<![\w.-])-(?=\d)", MINUS, text).replace(" %", "\N{NO-BREAK SPACE}%")


@dataclass(frozen=True)
class Axis:
    """What the width of a strip means: places are in per cent of it, so they fit any width."""

    ticks: tuple[float, ...]
    reference: float
    scale: int  # 100 for fractions, which are written in per cent

    @classmethod
    def around(cls, cells: Sequence[Cell], reference: float) -> "Axis":
        """An axis between two ticks, around all intervals and the reference."""
        estimates = [c for c in cells if isinstance(c, Estimate) and not math.isnan(c.value)]
        values = [reference, *(v for e in estimates for v in (e.value, e.low, e.high))]
        finite = [v for v in values if math.isfinite(v)]
        low, high = min(finite), max(finite)
        ticks = MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]).tick_values(low, max(high, low + 0.02))
        scale = 100 if all(e.proportion for e in estimates) else 1
        return cls(tuple(map(float, ticks)), reference, scale)

    def labels(self) -> list[tuple[str, str]]:
        """(place, text) of every tick."""
        return [(self.place(t), f"{round(t * self.scale, 10):g}") for t in self.ticks]

    def place(self, value: float) -> str:
        """The place of a value; values beyond an end are placed at that end."""
        low, high = self.ticks[0], self.ticks[-1]
        return f"{100 * min(1.0, max(0.0, (value - low) / (high - low))):.2f}%"


@dataclass(frozen=True)
class HtmlCell:
    """One cell as the template writes it."""

    kind: Literal["text", "number", "strip"]
    text: str = ""
    interval: str = ""
    colour: int | None = None
    estimate: Estimate | None = None  # what a strip draws


def _lay_out(block: Table | Strips, colours: Mapping[str, int]) -> dict[str, Any]:
    """What the template needs of a table: its rows in groups by name, "" if there are no groups."""
    table = block if isinstance(block, Table) else block.table
    columns = [*zip(*table.rows, strict=True)] or [()] * len(table.columns)
    is_estimate = [any(isinstance(cell, Estimate) for cell in cells) for cells in columns]
    is_text = [c.kind == "text" for c in table.columns]
    heading = [
        HtmlCell("text" if text and not has else "number", column.name)
        for column, text, has in zip(table.columns, is_text, is_estimate, strict=True)
    ]
    rows = [
        [_cell(*parts, colours) for parts in zip(row, texts, is_text, strict=True)]
        for row, texts in zip(table.rows, table.texts(), strict=True)
    ]
    axis = None
    if isinstance(block, Strips):
        place = [column.name for column in table.columns].index(block.column)
        axis = Axis.around(columns[place], block.reference)
        heading.insert(place + 1, HtmlCell("strip"))
        has_colours = any(cell.colour is not None for row in rows for cell in row)
        for row, value in zip(rows, columns[place], strict=True):
            # without colours all dots have the first one; with them, a row without is a baseline
            own = [cell.colour for cell in row if cell.colour is not None]
            colour = own[0] if own else None if has_colours else 0
            is_there = isinstance(value, Estimate) and not math.isnan(value.value)
            estimate = value if is_there else None
            row.insert(place + 1, HtmlCell("strip", colour=colour, estimate=estimate))
    # rows whose first cell is "" continue the group above
    is_grouped = any(row[0] == "" for row in table.rows)
    groups: list[tuple[str, list[Sequence[HtmlCell]]]] = [] if is_grouped else [("", [])]
    for row in rows:
        if is_grouped and (row[0].text or not groups):
            groups.append((row[0].text, []))
        groups[-1][1].append(row[is_grouped:])
    # with too many columns intervals stand below their values
    is_narrow = sum(is_estimate) > 3 or len(heading) > 8
    shown = {"title": table.title, "notes": table.notes, "is_narrow": is_narrow, "axis": axis}
    return {**shown, "heading": heading[is_grouped:], "groups": groups}


def _cell(cell: Cell, text: str, is_text: bool, colours: Mapping[str, int]) -> HtmlCell:
    if isinstance(cell, str):
        # "haf, implicit reward" is a head of the run haf
        colour = colours.get(text.partition(", ")[0])
        return HtmlCell("text" if is_text else "number", text, colour=colour)
    value, bracket, interval = typeset(text).partition(" [")
    is_number = isinstance(cell, Estimate) or not is_text
    return HtmlCell("number" if is_number else "text", value, bracket.strip() + interval)
