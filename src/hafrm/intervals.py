"""The interval of a share, for every room that shows one: Wilson's score interval, standard library only.

What is more than a share of independent trials (clusters, differences, composites) has its interval from
`hafrm.evaluation.statistics`, which uses this one where it applies.
"""

import math
from collections.abc import Mapping

Z95 = 1.959963984540054
"""Two-sided 95 % point of the normal distribution."""


def wilson(share: float, num: int | float, z: float = Z95) -> tuple[float, float]:
    """(low, high) of a share seen in `num` independent trials (Wilson 1927); [0, 1] for none.

    Unlike p +- z * se it stays inside [0, 1] and has a width at 0 and at 1. `num` need not be whole:
    trials that go together count as fewer.
    """
    if num <= 0:
        return 0.0, 1.0
    # Centre and half-width of the score interval.
    shrink = 1 + z**2 / num
    centre = (share + z**2 / (2 * num)) / shrink
    half = z * math.sqrt(share * (1 - share) / num + z**2 / (4 * num**2)) / shrink
    # The two exact ends, which rounding would miss by 1e-17.
    return (0.0 if share == 0 else centre - half), (1.0 if share == 1 else centre + half)


def with_bounds(name: str, share: float, num: int | float) -> dict[str, float]:
    """A share as it is logged: `name`, and its 95 % interval as `name`_low and `name`_high."""
    low, high = wilson(share, num)
    return {name: share, f"{name}_low": low, f"{name}_high": high}


def in_words(values: Mapping[str, float]) -> str:
    """Logged values as one line, an interval behind its share: "loss 0.5  accuracy 0.8 [0.7, 0.87]"."""
    parts = []
    for name, value in values.items():
        if name.removesuffix("_low") in values and name.endswith("_low"):
            continue
        if name.removesuffix("_high") in values and name.endswith("_high"):
            continue
        low, high = values.get(f"{name}_low"), values.get(f"{name}_high")
        bounds = "" if low is None or high is None else f" [{low:.3f}, {high:.3f}]"
        parts.append(f"{name} {value:.4g}{bounds}")
    return "  ".join(parts)
