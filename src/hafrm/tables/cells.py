"""Cells that hold a number with its interval."""

import math
from collections.abc import Sequence

from hafrm.evaluation.metrics import Accuracy
from hafrm.statistics import Estimate


def stacked(estimate: Estimate) -> str:
    """An estimate in per cent over its interval, which fits into a narrow column."""
    value, _, interval = str(estimate).partition(" [")
    return f"{value}\n[{interval}" if interval else value


def with_count(accuracy: Accuracy) -> str:
    """An accuracy over its interval, over the number of comparisons that it is of."""
    return f"{stacked(accuracy.estimate)}\nof {accuracy.num}" if accuracy.num else "n/a"


def bare(share: Estimate) -> str:
    """A share in per cent with its interval, the unit left to the table's title: "63.2 [59.1, 67.2]"."""
    if math.isnan(share.value):
        return "n/a"
    text = f"{100 * share.value:.1f}"
    if math.isnan(share.low):
        return text
    return f"{text} [{100 * share.low:.1f}, {100 * share.high:.1f}]"


def bars(counts: Sequence[int], top: int) -> str:
    """A histogram in one line; the highest bar stands for `top`, and only nothing is blank."""
    blocks = " ▁▂▃▄▅▆▇█"
    return "".join(blocks[math.ceil(8 * count / max(top, 1))] for count in counts)
