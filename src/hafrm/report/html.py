"""What a page is made of, and its HTML: sections of tables, plots and text, drawn with jinja2.

Every text is escaped by the template; only `Markup` passes as it is, and only this module and `plots`
make it. An interval strip is a dot with whiskers on an axis that all rows of a table share; places are in
per cent of the cell's width, so they fit any width without a script.
"""

import functools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.ticker import MaxNLocator

from hafrm.report.plots import HEIGHT, NUM_COLOURS, WIDTH, Plot
from hafrm.results import Cell, Column, Table
from hafrm.statistics import Estimate

MINUS = "\N{MINUS SIGN}"
STRIP_HEIGHT = 26
"""Pixels, about the height of a row."""


@dataclass(frozen=True)
class Strips:
    """A table with an interval strip after one of its columns."""

    table: Table
    column: str
    reference: float = 0.5
    """Where every row has a line."""


@dataclass(frozen=True)
class HeatMap:
    """A table whose fractions are shaded by their distance from one half."""

    table: Table


@dataclass(frozen=True)
class Plots:
    """Plots side by side, with one key for all of them."""

    plots: tuple[Plot, ...]
    key: tuple[tuple[str, int], ...] = ()
    """Names with their colours, where there are several."""
    note: str = ""


def drawn(
    plots: Iterable[Plot | None], key: tuple[tuple[str, int], ...] = (), note: str = ""
) -> tuple[Plots, ...]:
    """The plots that have something to draw, as one block; none without any."""
    shown = tuple(plot for plot in plots if plot is not None)
    return (Plots(shown, key, note),) if shown else ()


@dataclass(frozen=True)
class Points:
    """A list of sentences."""

    title: str
    sentences: tuple[str, ...]


@dataclass(frozen=True)
class Headline:
    """The number that matters, large."""

    value: Estimate
    label: str


@dataclass(frozen=True)
class Texts:
    """Labelled texts to read, in their own lines."""

    texts: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Listing:
    """A file, such as a recipe."""

    text: str


@dataclass(frozen=True)
class Details:
    """What is shown when it is opened."""

    title: str
    blocks: "tuple[Block, ...]"
    note: str = ""
    is_open: bool = False


Block = Table | Strips | HeatMap | Plots | Points | Headline | Texts | Listing | Details


@dataclass(frozen=True)
class PageSection:
    """A part of the page, with a sentence on how to read it."""

    key: str
    """Its anchor."""
    title: str
    lead: str
    blocks: tuple[Block, ...]


def render_page(
    sections: Sequence[PageSection],
    *,
    names: Sequence[str],
    subtitle: str,
    by: str,
    colours: Mapping[str, int],
) -> str:
    """The page as HTML; a cell whose text is a key of `colours` gets a dot of that colour."""
    template = _environment().get_template("page.html.j2")
    return template.render(
        sections=sections,
        names=names,
        subtitle=subtitle,
        by=by,
        lay_out=functools.partial(_lay_out, colours=colours),
        size=(WIDTH, HEIGHT),
    )


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("hafrm.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["typeset"] = _typeset
    environment.filters["kind"] = lambda block: type(block).__name__
    environment.filters["split_interval"] = _split_interval
    return environment


def _unbroken(text: str) -> str:
    """The text with no line break between a number and its per cent sign."""
    return text.replace(" %", "\N{NO-BREAK SPACE}%")


def _typeset(text: str) -> str:
    """The same for a sentence, with minus signs before negative numbers."""
    return _unbroken(re.sub(r"(?<![\w.-])-(?=\d)", MINUS, text))


def _split_interval(estimate: Estimate) -> tuple[str, str]:
    """The value and its interval, each as text."""
    value, bracket, interval = _unbroken(str(estimate)).replace("-", MINUS).partition(" [")
    return value, f"[{interval}" if bracket else ""


@dataclass(frozen=True)
class _HtmlCell:
    text: str
    kind: str
    """Its class: text, number, strip or heat."""
    interval: str = ""
    colour: int | None = None
    heat: int | None = None
    """Per cent of colour, above zero for fractions above one half."""
    strip: Markup | None = None


@dataclass(frozen=True)
class _HtmlTable:
    """A table as the template writes it."""

    title: str
    is_narrow: bool
    """Whether intervals stand below their values, and columns closer: there are too many."""
    heading: Sequence[_HtmlCell]
    groups: Sequence[tuple[str, Sequence[Sequence[_HtmlCell]]]]
    """Each with its name; "" where the table has none."""
    notes: tuple[str, ...]


def _lay_out(block: Table | Strips | HeatMap, colours: Mapping[str, int]) -> _HtmlTable:
    table = block if isinstance(block, Table) else block.table
    has_intervals = [
        any(isinstance(row[number], Estimate) for row in table.rows)
        for number in range(len(table.columns))
    ]
    heading = [
        _HtmlCell(c.name, "number" if has or c.kind != "text" else "text")
        for c, has in zip(table.columns, has_intervals, strict=True)
    ]
    rows = [
        [
            _cell(*cell, isinstance(block, HeatMap), colours)
            for cell in zip(row, texts, table.columns, strict=True)
        ]
        for row, texts in zip(table.rows, table.texts(), strict=True)
    ]
    for row in rows:
        # a run and its method may have one name: the first cell is enough
        for number in [n for n, cell in enumerate(row) if cell.colour is not None][1:]:
            row[number] = replace(row[number], colour=None)
    if isinstance(block, Strips):
        _add_strips(block, heading, rows)
    if isinstance(block, HeatMap):
        heading = [_HtmlCell(c.text, "heat" if c.kind == "number" else c.kind) for c in heading]
    # rows whose first cell is "" continue the group above
    is_grouped = any(row[0] == "" for row in table.rows)
    groups: list[tuple[str, list[Sequence[_HtmlCell]]]] = [] if is_grouped else [("", [])]
    for row in rows:
        if is_grouped and (row[0].text or not groups):
            groups.append((row[0].text, []))
        groups[-1][1].append(row[is_grouped:])
    is_narrow = sum(has_intervals) > 3 or len(heading) > 8
    title = table.title
    if title.partition(" ")[0].isalpha():  # a name, such as "test-chat:", keeps its letters
        title = title[0].upper() + title[1:]
    return _HtmlTable(title, is_narrow, heading[is_grouped:], groups, table.notes)


def _cell(
    cell: Cell, text: str, column: Column, is_heat: bool, colours: Mapping[str, int]
) -> _HtmlCell:
    if isinstance(cell, Estimate):
        value, interval = _split_interval(cell)
        if not is_heat or math.isnan(cell.value):
            return _HtmlCell(value, "number", interval)
        strength = round(min(125 * abs(cell.value - 0.5), 55))
        return _HtmlCell(value, "heat", interval, heat=strength if cell.value >= 0.5 else -strength)
    kind = "text" if column.kind == "text" else "number"
    if isinstance(cell, str):
        # "haf, fused" is a head of the run haf
        return _HtmlCell(_unbroken(text), kind, colour=colours.get(text.partition(", ")[0]))
    return _HtmlCell(_unbroken(text).replace("-", MINUS), kind)


def _add_strips(block: Strips, heading: list[_HtmlCell], rows: Sequence[list[_HtmlCell]]) -> None:
    """Insert the strips after their column, and their axis in the heading."""
    place = [column.name for column in block.table.columns].index(block.column)
    cells = [row[place] for row in block.table.rows]
    axis = _Axis.around(cells, block.reference)
    has_colours = any(cell.colour is not None for row in rows for cell in row)
    heading.insert(place + 1, _HtmlCell("", "strip", strip=axis.heading()))
    for row, value in zip(rows, cells, strict=True):
        colour = next((cell.colour for cell in row if cell.colour is not None), None)
        if colour is None and not has_colours:
            colour = 0
        row.insert(place + 1, _HtmlCell("", "strip", strip=axis.strip(value, colour)))


@dataclass(frozen=True)
class _Axis:
    """What a strip's width stands for."""

    ticks: tuple[float, ...]
    reference: float
    is_fraction: bool

    @classmethod
    def around(cls, cells: Sequence[Cell], reference: float) -> "_Axis":
        """An axis between two ticks, around all intervals and the reference."""
        estimates = [c for c in cells if isinstance(c, Estimate) and not math.isnan(c.value)]
        values = [reference, *(v for e in estimates for v in (e.value, e.low, e.high))]
        finite = [v for v in values if math.isfinite(v)]
        low, high = min(finite), max(finite)
        ticks = MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]).tick_values(low, max(high, low + 0.02))
        return cls(tuple(map(float, ticks)), reference, all(e.proportion for e in estimates))

    def heading(self) -> Markup:
        """The ticks; fractions in per cent."""
        texts = []
        for number, tick in enumerate(self.ticks):
            value = round(100 * tick if self.is_fraction else tick, 9)
            anchor = {0: "start", len(self.ticks) - 1: "end"}.get(number, "middle")
            text = Markup('<text x="{}" y="17" text-anchor="{}">{}</text>')
            texts.append(text.format(self._place(tick), anchor, f"{value:g}".replace("-", MINUS)))
        return _svg("axis", texts)

    def strip(self, cell: Cell, colour: int | None) -> Markup:
        """A dot with its interval, grey without a colour."""
        middle, line = self.reference, self._line
        drawn = [line("reference", middle, middle, -4, STRIP_HEIGHT + 4)]
        if isinstance(cell, Estimate) and not math.isnan(cell.value):
            y = STRIP_HEIGHT // 2
            mark = "base" if colour is None else f"c{colour % NUM_COLOURS}"
            if math.isfinite(cell.low) and math.isfinite(cell.high):
                drawn.append(line(f"whisker {mark}", cell.low, cell.high, y, y))
            dot = Markup('<circle class="dot {}" cx="{}" cy="{}" r="3.5"/>')
            drawn.append(dot.format(mark, self._place(cell.value), y))
        return _svg("strip", drawn)

    def _place(self, value: float) -> str:
        low, high = self.ticks[0], self.ticks[-1]
        return f"{100 * min(1.0, max(0.0, (value - low) / (high - low))):.2f}%"

    def _line(self, name: str, start: float, end: float, top: int, bottom: int) -> Markup:
        line = Markup('<line class="{}" x1="{}" x2="{}" y1="{}" y2="{}"/>')
        return line.format(name, self._place(start), self._place(end), top, bottom)


def _svg(name: str, parts: Sequence[Markup]) -> Markup:
    svg = Markup('<svg class="{}" width="100%" height="{}" aria-hidden="true">{}</svg>')
    return svg.format(name, STRIP_HEIGHT, Markup("").join(parts))
