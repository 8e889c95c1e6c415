"""The kinds of plots on the page: lines and dots over an axis, histograms; and their words.

Plain numbers in, figures out. Series are labelled where they end, never in a legend over the data.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from hafrm.reporting.axes import (
    DODGE,
    STEPS,
    Scale,
    Series,
    draw_series,
    label_ends,
    set_scale,
)
from hafrm.reporting.blocks import Figure
from hafrm.reporting.drawing import BAD, GOOD, HEIGHT, INK, PAPER, draw
from hafrm.reporting.numbers import finite, significant

TALL = 230.0
"""Of a panel whose slope is what one looks at."""
MOST_LABEL = 12
"""Characters of a name at the end of a line; longer ones are in the key alone."""
MOST_POINTS = 300
"""More points of a line than a panel has pixels are averaged."""


def chart(title: str, series: Sequence[Series], scale: Scale, unit: str = "") -> Figure | None:
    """Lines and dots; None where no series has a finite point."""
    shown = [s for s in map(_finite, series) if len(s.x)]
    if not shown:
        return None

    def fill(axes: Axes) -> None:
        dots = [each for each in shown if each.style == "dots"]
        for each in shown:
            is_dodged = each in dots and not scale.diagonal
            place = dots.index(each) - (len(dots) - 1) / 2 if is_dodged else 0.0
            draw_series(axes, each, DODGE * place)
        set_scale(axes, scale, shown)
        label_ends(axes, shown)

    svg, size = draw(title, fill, height=TALL if scale.diagonal else HEIGHT)
    return Figure(title, svg, size, _in_words(title, shown, scale), unit)


def histogram(
    title: str, edges: Sequence[float], right: Sequence[int], wrong: Sequence[int], unit: str = ""
) -> Figure | None:
    """Margins of the comparisons that were judged right, and of the others."""
    if len(edges) != len(right) + 1 or len(edges) != len(wrong) + 1 or not sum(right) + sum(wrong):
        return None
    widths = [b - a for a, b in itertools.pairwise(edges)]

    def fill(axes: Axes) -> None:
        for counts, colour, base in ((right, GOOD, [0] * len(right)), (wrong, BAD, right)):
            axes.bar(
                *(edges[:-1], counts, widths, base),
                align="edge",
                color=colour,
                edgecolor=PAPER,
                linewidth=0.5,
            )
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=STEPS))
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True, steps=STEPS))
        axes.set_xlabel("margin")
        top = axes.get_ylim()[1]
        axes.set_ylim(0, 1.12 * top)
        for text, x, colour in (("wrong", 0.0, BAD), ("right", 1.0, GOOD)):
            side = "left" if x == 0 else "right"
            axes.text(x, 1.0, text, color=colour, ha=side, va="top", transform=axes.transAxes)

    svg, size = draw(title, fill)
    words = f"{title}: {sum(right)} comparisons right and {sum(wrong)} wrong, by margin from "
    return Figure(title, svg, size, f"{words}{edges[0]:.3g} to {edges[-1]:.3g}", unit)


def end_label(name: str) -> str:
    """What may stand at the end of a line: the name, unless it would leave no room for the plot."""
    return name if len(name) <= MOST_LABEL else ""


def thinned(series: Series, most: int = MOST_POINTS) -> Series:
    """The same series with neighbouring points averaged, so that at most `most` are left."""
    size = math.ceil(len(series.x) / most)
    if size <= 1:
        return series
    starts = range(0, len(series.x), size)

    def averaged(values: Sequence[float]) -> list[float]:
        parts = [values[i : i + size] for i in starts] if values else []
        return [sum(part) / len(part) for part in parts]

    return replace(
        series,
        x=averaged(series.x),
        y=averaged(series.y),
        low=averaged(series.low),
        high=averaged(series.high),
    )


def _finite(series: Series) -> Series:
    """The points that can be drawn."""
    kept = [
        i
        for i, (x, y) in enumerate(zip(series.x, series.y, strict=True))
        if math.isfinite(x) and math.isfinite(y)
    ]
    bounded = len(series.low) == len(series.high) == len(series.x)
    low, high = (
        [b if math.isfinite(b) else series.y[i] for i, b in enumerate(bound)] if bounded else []
        for bound in (series.low, series.high)
    )
    return replace(
        series,
        x=[series.x[i] for i in kept],
        y=[series.y[i] for i in kept],
        low=[low[i] for i in kept] if bounded else (),
        high=[high[i] for i in kept] if bounded else (),
    )


def _in_words(title: str, shown: Sequence[Series], scale: Scale) -> str:
    """The plot for those who do not see it: where each series begins and ends."""

    def value(y: float) -> str:
        return f"{100 * y:.1f} %" if scale.per_cent else significant(y)

    def place(x: float) -> str:
        named = scale.ticks and float(x).is_integer() and 0 <= x < len(scale.ticks)
        return scale.ticks[int(x)] if named else f"{scale.x_name} {significant(finite(x))}"

    parts = []
    for each in shown:
        text = f"{each.name} from {value(each.y[0])} at {place(each.x[0])}"
        parts.append(f"{text} to {value(each.y[-1])} at {place(each.x[-1])}")
    return f"{title}: {'; '.join(parts)}"
