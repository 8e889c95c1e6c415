"""How series and scales are put on a plot's axes: lines, dots with whiskers, ticks, labels at the ends."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import ScaledTranslation

from hafrm.reporting.drawing import MUTED, NUM_COLOURS, line_colour, text_colour
from hafrm.reporting.numbers import significant

LABEL_GAP = 0.085
"""Least distance of two labels, as a part of the plot's height."""
DODGE = 4.0
"""Pixels between the dots of series that share their places."""
STEPS = (1, 2, 5, 10)
"""Ticks are these numbers apart, times a power of ten."""
QUARTERS = (0.0, 0.25, 0.5, 0.75, 1.0)
TENTHS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)

Style = Literal["line", "dashed", "faint", "dots"]
_LINES = {"line": "-", "dashed": (0, (4, 2)), "faint": "-", "dots": "-"}


@dataclass(frozen=True)
class Series:
    """One line of a plot."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    low: Sequence[float] = ()
    """Bounds of y, drawn as whiskers (dots) or as a band (lines)."""
    high: Sequence[float] = ()
    style: Style = "line"
    label: str = ""
    """What stands at its end."""


@dataclass(frozen=True)
class Scale:
    """How the axes of a plot are read."""

    x_name: str = "step"
    x_log: Literal[0, 2, 10] = 0
    y_log: bool = False
    per_cent: bool = False
    reference: float | None = None
    """A level to compare with."""
    diagonal: bool = False
    """Stated against observed probabilities, from one half up."""
    ticks: Sequence[str] = ()
    """Names of 0, 1, 2, ... on the horizontal axis."""
    marks: Sequence[tuple[float, int]] = ()
    """Places on the horizontal axis, each with the colour of the run that they are of."""


def draw_series(axes: Axes, each: Series, dodge: float) -> None:
    """One series, its dots `dodge` pixels aside, so that whiskers do not hide each other."""
    colour = line_colour(each.colour)
    # past the last colour, the dashes change
    line = _LINES[each.style] if each.colour < NUM_COLOURS else (0, (6, 1, 1, 1))
    if each.style == "dots":
        figure = axes.get_figure(root=True)
        assert figure is not None
        aside = axes.transData + ScaledTranslation(dodge / 72, 0, figure.dpi_scale_trans)
        for x, low, high in zip(each.x, each.low, each.high, strict=False):
            axes.plot([x, x], [low, high], color=colour, linewidth=1.2, transform=aside)
        axes.plot(each.x, each.y, color=colour, lw=0.8, alpha=0.6, ls=line, transform=aside)
        axes.plot(each.x, each.y, "o", color=colour, markersize=3.6, transform=aside)
        # what is drawn aside does not count for the limits by itself
        ends = [*each.y, *each.low, *each.high]
        axes.update_datalim(list(zip([*each.x] * (len(ends) // len(each.x)), ends, strict=True)))
        axes.autoscale_view()
        return
    if each.low:
        axes.fill_between(each.x, each.low, each.high, color=colour, alpha=0.13, linewidth=0)
    alpha, width = (0.4, 1.0) if each.style == "faint" else (1.0, 1.4)
    axes.plot(each.x, each.y, color=colour, linestyle=line, linewidth=width, alpha=alpha)
    if len(each.x) == 1:
        axes.plot(each.x, each.y, "o", color=colour, markersize=3.6)


def set_scale(axes: Axes, scale: Scale, shown: Sequence[Series]) -> None:
    """Ticks, levels and marks, once all series are drawn."""
    if scale.reference is not None:
        axes.axhline(scale.reference, color=MUTED, linewidth=0.8, linestyle=(0, (2, 3)))
    if scale.diagonal:
        axes.plot([0.5, 1], [0.5, 1], color=MUTED, linewidth=0.8, linestyle=(0, (2, 3)))
    for x, colour in scale.marks:
        axes.axvline(x, color=line_colour(colour), linewidth=0.8, alpha=0.7)
    _set_x(axes, scale, shown)
    if scale.diagonal:
        axes.set_yticks(QUARTERS, [f"{100 * q:.0f} %" for q in QUARTERS])
    elif scale.y_log and _is_wide(shown):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(numticks=5))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: significant(v)))
    else:
        axes.yaxis.set_major_locator(MaxNLocator(4, min_n_ticks=3, steps=STEPS))
        form = (lambda v, _: f"{_tick(100 * v)} %") if scale.per_cent else (lambda v, _: _tick(v))
        axes.yaxis.set_major_formatter(FuncFormatter(form))


def _is_wide(shown: Sequence[Series]) -> bool:
    """Whether values span so much that only a logarithm shows the small ones."""
    values = [y for each in shown for y in each.y]
    return min(values) > 0 and max(values) > 30 * min(values)


def _set_x(axes: Axes, scale: Scale, shown: Sequence[Series]) -> None:
    axes.set_xlabel(scale.x_name)
    if scale.ticks:
        axes.set_xticks(range(len(scale.ticks)), scale.ticks)
        axes.set_xlim(-0.5, len(scale.ticks) - 0.5)
    elif scale.diagonal:
        axes.set_xticks(TENTHS, [f"{100 * t:.0f} %" for t in TENTHS])
    elif scale.x_log and all(x > 0 for each in shown for x in each.x):
        axes.set_xscale("log", base=scale.x_log)
        places = sorted({x for each in shown for x in each.x})
        if len(places) <= 9:
            axes.set_xticks(places, [significant(x) for x in places])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: significant(v)))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=STEPS))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: _tick(v)))


def _tick(value: float) -> str:
    """A tick's text: thousands apart, no exponent where it can be helped, a true minus."""
    if abs(value) >= 10_000:
        return f"{value / 1000:,.4g}k".replace("-", "\N{MINUS SIGN}")
    return significant(round(value, 10))


def label_ends(axes: Axes, shown: Sequence[Series]) -> None:
    """Each label beside the last point of its line, moved apart where they would touch."""
    labelled = [each for each in shown if each.label]
    if not labelled:
        return
    low, high = axes.get_ylim()
    is_log = axes.get_yscale() == "log"

    def height(y: float) -> float:
        if is_log:
            return math.log(y / low) / math.log(high / low)
        return (y - low) / (high - low)

    ends = sorted(((height(each.y[-1]), each) for each in labelled), key=lambda end: end[0])
    places = spread([place for place, _ in ends], LABEL_GAP)
    for place, (_, each) in zip(places, ends, strict=True):
        axes.text(
            *(1.02, place, printable(each.label)),
            color=text_colour(each.colour),
            transform=axes.transAxes,
            va="center",
            clip_on=False,
        )


def printable(name: str) -> str:
    """The name without what XML forbids, such as control characters and halves of a pair."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Sorted places moved as little as need be, so that neighbours are `gap` apart."""
    blocks: list[tuple[float, int]] = []  # centre and number of the labels that touch
    for place in places:
        centre, num = place, 1
        while blocks and (centre - blocks[-1][0]) < gap * (num + blocks[-1][1]) / 2:
            other, n = blocks.pop()
            centre, num = (centre * num + other * n) / (num + n), num + n
        blocks.append((centre, num))
    return [c + gap * (i - (n - 1) / 2) for c, n in blocks for i in range(n)]
