"""An estimate over its interval, for tables that are not `hafrm.table.Table`s yet."""

from hafrm.statistics import Estimate


def stacked(estimate: Estimate) -> str:
    """An estimate in per cent over its interval, which fits into a narrow column."""
    value, _, interval = str(estimate).partition(" [")
    return f"{value}\n[{interval}" if interval else value
