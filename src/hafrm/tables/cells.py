"""Cells that hold a number with its interval."""

from hafrm.evaluation.metrics import Accuracy
from hafrm.evaluation.statistics import Estimate


def stacked(estimate: Estimate) -> str:
    """An estimate in per cent over its interval, which fits into a narrow column."""
    value, _, interval = str(estimate).partition(" [")
    return f"{value}\n[{interval}" if interval else value


def with_count(accuracy: Accuracy) -> str:
    """An accuracy over its interval, over the number of comparisons that it is of."""
    return f"{stacked(accuracy.estimate)}\nof {accuracy.num}" if accuracy.num else "n/a"
