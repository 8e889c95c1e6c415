"""Accuracy by whatever divides the comparisons: tags of the data, length, turns, margins, votes.

A division is a label for each comparison. Numbers become bands that hold about a quarter each. A division
with one label says no more than the accuracy of all, and is left out.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Num, Shaped

from hafrm.evaluation.metrics import Result
from hafrm.preferences import Votes
from hafrm.statistics import Estimate, accuracy_interval

MAX_VALUES = 24
"""Of a division; rarer labels are put together. RewardBench's 23 subsets stay apart."""
_NUMBER = re.compile(r"-?\d+(\.\d+)?(e[-+]?\d+)?")
_OWN_BAND = 5
"""Up to so many distinct numbers, each is a band of its own."""


@dataclass(frozen=True, slots=True)
class Slice(Result):
    """The comparisons with one label."""

    tag: str
    value: str
    accuracy: Estimate


def slice_accuracies(
    margins: Float[np.ndarray, " comparisons"],
    divisions: Mapping[str, Sequence[str]],
    prompts: Shaped[np.ndarray, " comparisons"],
) -> tuple[Slice, ...]:
    """Accuracy of each label of each division, the labels in the order of `in_order`."""
    found = []
    for tag, labels in divisions.items():
        kept = np.array(_without_rare(labels), dtype=object)
        values = in_order(kept.tolist())
        if len(values) > 1:
            for value in values:
                rows = kept == value
                accuracy = accuracy_interval(margins[rows] > 0, prompts[rows])
                found.append(Slice(tag, value, accuracy))
    return tuple(found)


def in_order(labels: Sequence[str]) -> list[str]:
    """The distinct labels: those that start with a number by that number, then the others by name."""

    def key(label: str) -> tuple[bool, float, str]:
        number = _NUMBER.match(label)
        return number is None, float(number[0]) if number else 0.0, label

    return sorted(set(labels), key=key)


def bands(values: Num[np.ndarray, " comparisons"], unit: str = "") -> list[str]:
    """A label for each number: itself where there are few distinct ones, else its quarter's range.

    Quarters are cut at numbers that occur, so that equal numbers stay together.
    """
    distinct = np.unique(values)
    if len(distinct) <= _OWN_BAND:
        return [_named(value, value, unit) for value in values.tolist()]
    uppers = np.unique(np.quantile(values, [0.25, 0.5, 0.75, 1.0], method="inverted_cdf"))
    which = np.searchsorted(uppers, values)
    lowers = [values[which == k].min().item() for k in range(len(uppers))]
    names = [_named(low, high, unit) for low, high in zip(lowers, uppers.tolist(), strict=True)]
    return [names[k] for k in which]


def vote_label(votes: Votes | None) -> str:
    """The chosen response's share of the judges, such as "80 % of votes"."""
    if votes is None or sum(votes) == 0:
        return "no votes"
    return f"{100 * votes.chosen / sum(votes):.0f} % of votes"


def _named(low: int | float, high: int | float, unit: str) -> str:
    text = f"{low:g}" if low == high else f"{low:g} to {high:g}"
    return f"{text} {unit}".strip()


def _without_rare(labels: Sequence[str]) -> list[str]:
    """The labels, with all but the MAX_VALUES - 1 commonest named together where there are more."""
    counts = Counter(labels)
    if len(counts) <= MAX_VALUES:
        return list(labels)
    common = {label for label, _ in counts.most_common(MAX_VALUES - 1)}
    other = f"({len(counts) - len(common)} others)"
    return [label if label in common else other for label in labels]
