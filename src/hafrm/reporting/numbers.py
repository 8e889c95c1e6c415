"""Numbers out of JSON, with their intervals, and how they are written for people.

Written as `hafrm evaluate` prints them, so that a number looks the same wherever it is read. What JSON has
as null, or does not have at all, is "n/a".
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hafrm.statistics import wilson

NONE = "n/a"
MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True, slots=True)
class Number:
    """A value and its interval, as an Estimate has them on disk; NaN where there is none."""

    value: float
    low: float = math.nan
    high: float = math.nan
    num: int | None = None
    """Items behind the value."""

    @property
    def has_interval(self) -> bool:
        """Whether both bounds are known."""
        return not (math.isnan(self.low) or math.isnan(self.high))


def finite(value: Any) -> float:
    """A number of JSON as a float; NaN for null, for what is absent and for what is no number."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else math.nan


def number(estimate: Any) -> Number | None:
    """The Estimate in a mapping of JSON, or None where nothing was estimated."""
    if isinstance(estimate, Mapping) and "estimate" in estimate:
        estimate = estimate["estimate"]
    if not isinstance(estimate, Mapping) or math.isnan(finite(estimate.get("value"))):
        return None
    num = estimate.get("num")
    value, low, high = (finite(estimate.get(name)) for name in ("value", "low", "high"))
    return Number(value, low, high, num if isinstance(num, int) else None)


def share_of(share: float, num: int) -> Number:
    """A share of `num` independent trials, with Wilson's interval."""
    return Number(share, *wilson(share, num), num)


def per_cent(found: Number | None) -> str:
    """A share in per cent, such as "63.2 %"."""
    return NONE if found is None else f"{100 * found.value:.1f} %"


def bounds(found: Number | None) -> str:
    """The interval of a share in per cent, such as "[59.1, 67.2]"; empty where there is none."""
    if found is None or not found.has_interval:
        return ""
    return f"[{signed(100 * found.low)}, {signed(100 * found.high)}]"


def share(found: Number | None) -> str:
    """A share with its interval, such as "63.2 % [59.1, 67.2]"."""
    return f"{per_cent(found)} {bounds(found)}".strip()


def points(found: Number | None) -> str:
    """A difference of shares in points, always with its sign: "+3.1"."""
    return NONE if found is None else signed(100 * found.value, plus=True)


def difference(found: Number | None) -> str:
    """A difference of shares with its interval: "+3.1 points [0.4, 5.8]"."""
    return NONE if found is None else f"{points(found)} points {bounds(found)}".strip()


def signed(value: float, digits: int = 1, *, plus: bool = False) -> str:
    """A number with the minus sign that is as wide as a plus."""
    text = f"{value:+.{digits}f}" if plus else f"{value:.{digits}f}"
    return text.replace("-", MINUS)


def decimal(value: Any, digits: int = 3) -> str:
    """A number of JSON with so many digits, or "n/a"."""
    value = finite(value)
    return NONE if math.isnan(value) else signed(value, digits)


def with_bounds(found: Number | None, digits: int = 2) -> str:
    """A value that is no share, with its interval: "1.32 [1.20, 1.44]"."""
    if found is None:
        return NONE
    text = signed(found.value, digits)
    if not found.has_interval:
        return text
    return f"{text} [{signed(found.low, digits)}, {signed(found.high, digits)}]"


def count(value: Any) -> str:
    """A whole number with its thousands apart: "12,800"."""
    return f"{value:,}" if isinstance(value, int) else NONE


def counted(number: int, noun: str) -> str:
    """So many of a thing: "1 row", "1,200 rows"."""
    return f"{count(number)} {noun}" if number == 1 else f"{count(number)} {noun}s"


def p_value(value: Any) -> str:
    """A p-value with two significant digits, or that it is below 0.001."""
    value = finite(value)
    if math.isnan(value):
        return NONE
    return "< 0.001" if value < 0.001 else f"{value:.2g}"


def significant(value: Any) -> str:
    """A number in the form that suits its size, such as 3e-05 or 0.25 or 1,200."""
    value = finite(value)
    if math.isnan(value):
        return NONE
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}".replace("-", MINUS)
