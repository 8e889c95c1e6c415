"""Small plots inside table cells: dots with whiskers and bars of shares, on an axis that rows share.

Places are in per cent of the cell's width, so they fit any width without a script; colours are classes
of the style sheet.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from hafrm.reporting.numbers import MINUS, Number

HEIGHT = 26
"""About that of a row."""
APART = 9
"""Pixels between two marks of a row."""
NUM_COLOURS = 7
"""As many as the style sheet has for runs, methods and models."""


@dataclass(frozen=True)
class Axis:
    """What a strip's width stands for."""

    low: float
    high: float
    step: float
    reference: float
    """Where a line stands in every row, such as one half or no difference."""

    def place(self, value: float) -> str:
        """Where a value lies, in per cent of the width; values outside lie on the edge."""
        part = (value - self.low) / (self.high - self.low)
        return f"{100 * min(1.0, max(0.0, part)):.2f}%"


@dataclass(frozen=True)
class Mark:
    """One dot with its whiskers."""

    number: Number | None
    colour: int | None = None
    """None for a baseline, in grey."""
    is_hollow: bool = False


def axis_of(numbers: Iterable[Number | None], reference: float) -> Axis:
    """An axis on which all values and their intervals, and the reference, lie between whole ticks."""
    ends = [reference]
    for found in numbers:
        if found is not None:
            ends += [e for e in (found.value, found.low, found.high) if not math.isnan(e)]
    low, high = min(ends), max(ends)
    wanted = max(high - low, 0.02) / 3
    step = next((s for s in (0.01, 0.02, 0.05, 0.1, 0.2, 0.25) if s >= wanted), 0.5)
    low, high = math.floor(low / step) * step, math.ceil(high / step) * step
    return Axis(low, high if high > low else low + step, step, reference)


def heading(axis: Axis, *, sign: bool = False) -> Markup:
    """The axis itself, for the head of the column: ticks in per cent, or points with their sign."""
    count = round((axis.high - axis.low) / axis.step)
    every = max(1, math.ceil(count / 4))
    texts = []
    for i in range(0, count + 1, every):
        value = axis.low + i * axis.step
        label = f"{100 * value:+.0f}" if sign and round(100 * value) else f"{100 * value:.0f}"
        anchor = "start" if i == 0 else "end" if i == count else "middle"
        texts.append(
            Markup('<text x="{}" y="17" text-anchor="{}">{}</text>').format(
                axis.place(value), anchor, label.replace("-", MINUS)
            )
        )
    return _svg(texts, "axis")


def whiskers(axis: Axis, marks: Sequence[Mark]) -> Markup:
    """Dots with their intervals, one under the other."""
    parts = [_line("reference", axis.reference, axis.reference, axis, -4, HEIGHT + 4)]
    for i, mark in enumerate(marks):
        if mark.number is None:
            continue
        middle = HEIGHT // 2 + round(APART * (i - (len(marks) - 1) / 2))
        found, kind = (
            mark.number,
            "base" if mark.colour is None else f"c{mark.colour % NUM_COLOURS}",
        )
        if found.has_interval:
            parts.append(_line(f"whisker {kind}", found.low, found.high, axis, middle, middle))
        hollow = " hollow" if mark.is_hollow else ""
        parts.append(
            Markup('<circle class="dot {}{}" cx="{}" cy="{}" r="3.5"/>').format(
                kind, hollow, axis.place(found.value), middle
            )
        )
    return _svg(parts, "strip")


def bar(shares: Sequence[tuple[float, str]]) -> Markup:
    """A bar in parts: shares of one, each with its class of the style sheet."""
    parts, start = [], 0.0
    for width, kind in shares:
        if not math.isnan(width) and width > 0:
            parts.append(
                Markup('<rect class="{}" x="{:.2f}%" width="{:.2f}%" y="8" height="10"/>').format(
                    kind, 100 * start, 100 * width
                )
            )
            start += width
    return _svg(parts, "strip")


def _line(kind: str, start: float, end: float, axis: Axis, top: int, bottom: int) -> Markup:
    return Markup('<line class="{}" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
        kind, axis.place(start), axis.place(end), top, bottom
    )


def _svg(parts: Sequence[Markup], kind: str) -> Markup:
    inside = Markup("").join(parts)
    return Markup('<svg class="{}" width="100%" height="{}" aria-hidden="true">{}</svg>').format(
        kind, HEIGHT, inside
    )
