"""Two models, or two methods with several seeds each, on the same comparisons: which one is better.

If many sets are compared, some differ by chance: the p-values are adjusted for their number.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Shaped

from hafrm.evaluation.comparisons import PromptKeys
from hafrm.results import Cell, Table, columns
from hafrm.statistics import (
    Difference,
    Estimate,
    accuracy_interval,
    cluster_p_value,
    clustered_bootstrap,
    holm,
    mcnemar,
    paired_bootstrap,
    seeded_difference,
    seeded_mean,
)


@dataclass(frozen=True, slots=True)
class SetComparison:
    """What two sides get right of one source, or of all of them together."""

    name: str
    num: int  # comparisons that are no ties
    first: Estimate  # Accuracy, over all seeds if there are several
    second: Estimate | None = None
    difference: Difference | None = None  # first minus second
    p_adjusted: float | None = None
    """The difference's p-value, adjusted (Holm) for the number of sources."""


@dataclass(frozen=True, slots=True)
class ModelComparison:
    """All sets, and the models on either side."""

    first: tuple[str, ...]
    second: tuple[str, ...]
    sets: tuple[SetComparison, ...]

    def tables(self) -> tuple[Table, ...]:
        """Accuracy of both sides on every set, their difference, and its p-values."""
        sides = (("first", self.first), ("second", self.second))
        title = "accuracy [95 %]" + (" over seeds" if len(self.first) > 1 else "")
        heads = "set | comparisons: count | first: percent"
        heads += " | second: percent | difference: percent | p: p | p (Holm): p" * bool(self.second)
        rows: list[tuple[Cell, ...]] = []
        for s in self.sets:
            gap = s.difference
            tested = () if gap is None else (s.second, gap.estimate, gap.p_value, s.p_adjusted)
            rows.append((s.name, s.num, s.first, *tested))
        notes = tuple(f"{side}: {', '.join(paths)}" for side, paths in sides if paths)
        return (Table(title, columns(heads), tuple(rows), notes),)


def compare_set(
    name: str,
    prompts: PromptKeys,
    right: Shaped[np.ndarray, "seeds comparisons"],
    other: Shaped[np.ndarray, "other_seeds comparisons"] | None = None,
) -> SetComparison:
    """One set by the right answers of the models of each side, or of the only side."""
    first = accuracy_over_seeds(right, prompts)
    if other is None:
        return SetComparison(name, len(prompts), first)
    second, difference = accuracy_over_seeds(other, prompts), compare_correct(right, other, prompts)
    return SetComparison(name, len(prompts), first, second, difference)


def compare_correct(
    first: Shaped[np.ndarray, "first_seeds comparisons"],
    second: Shaped[np.ndarray, "second_seeds comparisons"],
    prompts: PromptKeys,
) -> Difference:
    """The difference of two [seeds, comparisons] arrays of right answers, which may be weighted (floats).

    With several seeds on both sides the interval is over prompts and seeds; for one model on each side it
    is the paired bootstrap's over prompts, with McNemar's exact p-value if it applies.
    """
    if len(first) > 1:  # McNemar's test knows nothing of seeds
        return seeded_difference(first, second, prompts)
    estimate = paired_bootstrap(first[0], second[0], prompts)
    if first.dtype == bool and len(np.unique(prompts)) == len(prompts):
        return Difference(estimate, mcnemar(first[0], second[0]))
    # several comparisons of a prompt are not independent, as McNemar's test takes them to be
    gaps = first[0].astype(np.float64) - second[0]
    return Difference(estimate, cluster_p_value(gaps, prompts))


def accuracy_over_seeds(
    correct: Shaped[np.ndarray, "seeds comparisons"], prompts: PromptKeys
) -> Estimate:
    """The accuracy of one model, or the mean over several seeds; answers may be weighted (floats)."""
    if len(correct) > 1:
        return seeded_mean(correct, prompts)
    if correct.dtype == bool:
        return accuracy_interval(correct[0], prompts)
    mean = clustered_bootstrap(correct[0], prompts)
    # a weighted answer may exceed 1, and so may a resample's mean
    return replace(mean, low=max(0.0, mean.low), high=min(1.0, mean.high))


def adjusted(sets: Sequence[SetComparison]) -> tuple[SetComparison, ...]:
    """The sets with Holm's p-values over the sources; "all" is their union and no test of its own."""
    # a source may be called "all"; then it is the only one
    tested = [s for s in sets if s.difference and (s.name != "all" or len(sets) == 1)]
    p_values = holm(np.array([s.difference.p_value for s in tested if s.difference])).tolist()
    by_name = dict(zip([s.name for s in tested], p_values, strict=True))
    return tuple(replace(s, p_adjusted=by_name.get(s.name)) for s in sets)
