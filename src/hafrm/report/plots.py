"""Plots as inline SVG: lines and dots with whiskers, drawn by matplotlib.

Colours are classes of the page's style sheet (`c0` ...), so one drawing serves light and dark.
"""

import hashlib
import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from hafrm.statistics import Estimate

WIDTH, HEIGHT = 310, 190
"""Size of a plot in pixels: a phone shows one at this size, a wide page three side by side."""
NUM_COLOURS = 7  # as many as the style sheet has for runs and models
MAX_POINTS = 300  # a line with more points than a plot has pixels is averaged down to this many
FAINT = (0.5, 0.5, 0.5, 0.35)  # grey of rules and reference lines, on light and on dark paper

SETTINGS: dict[Any, Any] = {
    "svg.hashsalt": "hafrm",  # the same drawing has the same ids
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "font.size": 11.0,
    "font.family": "DejaVu Sans",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.edgecolor": FAINT,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    # matplotlib writes no colour for black, so the style sheet decides
    "xtick.labelcolor": "black",
    "ytick.labelcolor": "black",
    "ytick.major.size": 0.0,
    "lines.linewidth": 1.5,
    "lines.markersize": 4.0,
}


_LONG = re.compile(r"\d+\.\d{2,}")


@dataclass(frozen=True)
class Plot:
    """A drawn plot with the title above it and a description for screen readers."""

    title: str
    svg: Markup  # what is inside the svg element
    description: str
    unit: str = ""


@dataclass(frozen=True)
class Series:
    """One line of a plot, or dots with whiskers."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    low: Sequence[float] = ()  # bounds of y, drawn as whiskers (dots) or as a band (lines)
    high: Sequence[float] = ()
    style: Literal["line", "dashed", "faint", "dots"] = "line"


@dataclass(frozen=True)
class AxisScale:
    """How the axes of a plot are read."""

    x_name: str = "step"
    x_log: Literal[0, 2, 10] = 0  # the base of a logarithmic axis
    is_fraction: bool = False  # whether y is written in per cent
    reference: float | None = None  # a level to compare with
    diagonal: bool = False  # predicted against observed probabilities, from one half up
    ticks: Sequence[str] = ()  # names of 0, 1, 2, ... on the horizontal axis
    marks: Sequence[tuple[float, int]] = ()
    """Places on the horizontal axis, each with the colour of its run."""


def estimates(
    name: str, x: Sequence[float], values: Sequence[Estimate | None], colour: int, **options: Any
) -> Series:
    """The series of values with their intervals; None leaves a gap."""
    y, low, high = (
        [math.nan if v is None else getattr(v, part) for v in values]
        for part in ("value", "low", "high")
    )
    return Series(name, x, y, colour, low, high, **options)


def chart(title: str, series: Sequence[Series], scale: AxisScale, unit: str = "") -> Plot | None:
    """A plot of all series that have a finite point; None if there is none."""
    shown = [_thinned(s) for s in series if np.isfinite(np.asarray(s.y, float)).any()]
    if not shown:
        return None

    def fill(axes: Axes) -> None:
        for s in shown:
            _draw(axes, s)
        _set_axes(axes, scale, shown)

    # for screen readers: where each series begins and ends
    ends = []
    for s in shown:
        values = [y for y in s.y if math.isfinite(y)]
        ends.append(f"{s.name} from {values[0]:.4g} to {values[-1]:.4g}")
    return Plot(title, _svg(title, fill), f"{title}: {'; '.join(ends)}", unit)


def _draw(axes: Axes, series: Series) -> None:
    colour = f"c{series.colour % NUM_COLOURS}"
    x, y, low, high = (np.asarray(v, float) for v in (series.x, series.y, series.low, series.high))
    is_dotted = series.style == "dots"
    drawn: list[Artist] = []
    if low.size and is_dotted:
        drawn.append(axes.vlines(x, low, high, linewidth=1.2, color="black"))
    elif low.size:
        drawn.append(axes.fill_between(x, low, high, alpha=0.13, linewidth=0))
    alpha = {"line": 1.0, "dashed": 1.0, "faint": 0.4, "dots": 0.6}[series.style]
    dashes: Any = (0, (4, 2)) if series.style == "dashed" else "-"
    drawn += axes.plot(x, y, alpha=alpha, linestyle=dashes, linewidth=0.8 if is_dotted else 1.5)
    if is_dotted or np.isfinite(y).sum() == 1:  # a line of one point is invisible
        drawn += axes.plot(x, y, "o")
    for artist in drawn:
        # matplotlib only has ids, which `_svg` turns into classes
        artist.set_gid(f"class:{colour}")


def _set_axes(axes: Axes, scale: AxisScale, shown: Sequence[Series]) -> None:
    dotted: Any = (0, (2, 3))
    axes.set_xlabel(scale.x_name)
    if scale.reference is not None:
        axes.axhline(scale.reference, color=FAINT, linewidth=1.0, linestyle=dotted)
    for x, colour in scale.marks:
        axes.axvline(x, linewidth=0.8, alpha=0.7).set_gid(f"class:c{colour % NUM_COLOURS}")
    percent = FuncFormatter(lambda value, _: f"{_tick(100 * value)} %")
    if scale.diagonal:
        axes.plot([0.5, 1], [0.5, 1], color=FAINT, linewidth=1.0, linestyle=dotted)
    axes.yaxis.set_major_locator(MaxNLocator(4, min_n_ticks=3, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(percent if scale.is_fraction else PLAIN)
    # zeros are drawn whole, above no negative tick
    if scale.is_fraction and axes.get_ylim()[0] < 0:
        axes.set_ylim(bottom=-0.02 * axes.get_ylim()[1])
    if scale.ticks:
        axes.set_xticks(range(len(scale.ticks)), list(scale.ticks))
        axes.set_xlim(-0.5, len(scale.ticks) - 0.5)
    elif scale.x_log:
        axes.set_xscale("log", base=scale.x_log)
        places = sorted({x for s in shown for x in s.x})
        if len(places) <= 9:
            axes.set_xticks(places)
        axes.xaxis.set_major_formatter(PLAIN)
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(percent if scale.diagonal else PLAIN)


def _tick(value: float) -> str:
    text = f"{value / 1000:,.4g}k" if abs(value) >= 10_000 else f"{round(value, 10):.6g}"
    return text.replace("-", "\N{MINUS SIGN}")


PLAIN = FuncFormatter(lambda value, _: _tick(value))


def _thinned(series: Series) -> Series:
    """The same series with neighbouring points averaged, so that at most MAX_POINTS are left."""
    size = math.ceil(len(series.x) / MAX_POINTS)
    if size <= 1:
        return series

    def averaged(values: Sequence[float]) -> list[float]:
        return [float(np.mean(values[i : i + size])) for i in range(0, len(values), size)]

    x, y, low, high = map(averaged, (series.x, series.y, series.low, series.high))
    return replace(series, x=x, y=y, low=low, high=high)


def _svg(title: str, fill: Callable[[Axes], None]) -> Markup:
    """What is inside the svg element of a plot that `fill` draws."""
    with mpl.rc_context(SETTINGS), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # glyphs that only the browser has
        layout = ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.03)
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72), layout=layout)
        figure.patch.set_visible(False)
        axes = figure.add_subplot()
        axes.patch.set_visible(False)
        fill(axes)
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    drawn = file.getvalue().decode("utf-8")
    # before the figure are metadata and a style that would apply to the whole page
    inside = drawn[drawn.index('<g id="figure_1">') : drawn.rindex("</svg>")]
    # ids of markers and clip paths occur in every plot: each plot gets its own prefix
    prefix = hashlib.sha256((title + inside).encode("utf-8", "replace")).hexdigest()[:8]
    inside = re.sub(r'<g id="class:([^"]*)">', r'<g class="\1">', inside)
    inside = re.sub(r'<g id="[^"]*">', "<g>", inside).replace("xlink:href", "href")
    inside = re.sub(r'( id="| href="#|url\(#)', rf"\g<1>p{prefix}", inside)
    inside = re.sub(r"#[0-9a-f]{6}(?=[;\"])", "currentColor", inside)
    # a tenth of a pixel is enough
    inside = re.sub(r"<[^>]*>", lambda t: _LONG.sub(lambda n: f"{float(n[0]):.1f}", t[0]), inside)
    return Markup(inside.replace("\n", " "))  # noqa: S704 - matplotlib escapes its texts
