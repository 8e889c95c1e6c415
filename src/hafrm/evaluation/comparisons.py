"""Comparisons of test data as flat arrays, their margins, and which of two models is better on them.

A comparison that annotators called a tie has no right answer: `decided` leaves it out. If many sets are
compared, some differ by chance, so the p-values are adjusted for their number.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from hafrm.data.files import show
from hafrm.data.reader import PreferenceData, read_preferences
from hafrm.errors import DataError
from hafrm.preferences import Comparison, Group, prompt_key
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

Margins = Float[np.ndarray, " comparisons"]
PromptKeys = Shaped[np.ndarray, " comparisons"]
"""Which prompt (any key): the clusters of the intervals."""
Indices = Int[np.ndarray, " some"]
Data = str | Path | Iterable[str | Path | Mapping[str, Any]]
"""One source or several, as for `hafrm.data.reader.read_preferences`, or a list of rows."""


@dataclass(frozen=True)
class Comparisons:
    """Comparisons among the responses of `groups`; every array has one entry per comparison."""

    groups: Sequence[Group]
    owner: Int[np.ndarray, " comparisons"]  # index of each comparison's group
    pairs: tuple[Comparison, ...]

    @classmethod
    def of(cls, groups: Sequence[Group]) -> "Comparisons":
        """The comparisons of the groups, in their order, without those of weight 0."""
        every = ((i, pair) for i, group in enumerate(groups) for pair in group.comparisons)
        owned = [(i, pair) for i, pair in every if pair.weight > 0]
        return cls(groups, np.array([i for i, _ in owned], int), tuple(pair for _, pair in owned))

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def num_responses(self) -> int:
        """Number of responses of all groups, which is the number of scores that a model gives."""
        return sum(len(group.responses) for group in self.groups)

    def take(self, indices: Indices) -> "Comparisons":
        """The comparisons at the given indices."""
        return Comparisons(self.groups, self.owner[indices], tuple(self.pairs[i] for i in indices))

    def decided(self) -> "Comparisons":
        """The comparisons that are not ties."""
        return self.take(np.flatnonzero(~self.ties))

    def scored_by(self, *scores: Float[np.ndarray, " responses"]) -> "Comparisons":
        """The comparisons whose two responses have a score (not NaN) in each of `scores`."""
        if not scores:
            return self
        have = ~np.isnan(np.stack(scores)).any(0)
        first, pairs = response_offsets(self.groups)[self.owner], self.pairs
        sides = np.array([(pair.chosen, pair.rejected) for pair in pairs], int).reshape(-1, 2)
        return self.take(np.flatnonzero(have[first[:, None] + sides].all(1)))

    def by_source(self) -> dict[str, Indices]:
        """The indices of each source's comparisons; sources keep their order."""
        sources = np.array([self.groups[i].source for i in self.owner], str)
        return {n: np.flatnonzero(sources == n) for n in dict.fromkeys(sources.tolist())}

    def sets(self) -> dict[str, Indices]:
        """The same, and last all of them as "all" (or "all sources", if one of them is called all)."""
        sources = self.by_source()
        name = "all sources" if "all" in sources else "all"
        return sources | ({name: np.arange(len(self))} if len(sources) > 1 else {})

    def margins(self, scores: Float[np.ndarray, " responses"]) -> Margins:
        """score(chosen) - score(rejected) in float64, from a finite score for each response."""
        first = response_offsets(self.groups)
        assert len(scores) == first[-1], "one score for each response of each group"
        # float32 would round the difference of two large scores
        start, exact = first[self.owner], scores.astype(np.float64)
        chosen = start + np.array([pair.chosen for pair in self.pairs], int)
        rejected = start + np.array([pair.rejected for pair in self.pairs], int)
        return np.asarray(exact[chosen] - exact[rejected], np.float64)

    @cached_property
    def ties(self) -> Bool[np.ndarray, " comparisons"]:
        """Whether annotators preferred neither response."""
        return np.array([pair.tie for pair in self.pairs], bool)

    @cached_property
    def prompts(self) -> PromptKeys:
        """The prompt's key."""
        # a digest per group and not per comparison: groups have many
        keys = {i: prompt_key(self.groups[i].prompt) for i in set(self.owner.tolist())}
        return np.array([keys[i] for i in self.owner.tolist()], str)

    @cached_property
    def chosen_texts(self) -> list[str]:
        """The responses that annotators preferred."""
        return [g.responses[pair.chosen] for g, pair in self.with_groups()]

    @cached_property
    def rejected_texts(self) -> list[str]:
        """The responses that they did not prefer."""
        return [g.responses[pair.rejected] for g, pair in self.with_groups()]

    @cached_property
    def lengths(self) -> Int[np.ndarray, "2 comparisons"]:
        """Length of the chosen and of the rejected response, in characters."""
        # in tokens, long responses that the model's limit cuts would seem equally long
        return np.array(
            [[*map(len, side)] for side in (self.chosen_texts, self.rejected_texts)], int
        )

    def with_groups(self) -> list[tuple[Group, Comparison]]:
        """Each comparison with its group."""
        return [(self.groups[i], pair) for i, pair in zip(self.owner, self.pairs, strict=True)]


def response_offsets(groups: Sequence[Group]) -> Int[np.ndarray, " groups_and_end"]:
    """Index of each group's first response among all responses, and the number of all responses."""
    return np.cumsum([0, *(len(group.responses) for group in groups)])


def read_comparisons(
    data: Data, max_bad_fraction: float = 0.02, **options: Any
) -> tuple[PreferenceData, Comparisons]:
    """What the data holds, and the comparisons of the groups that have some.

    `options` are those of `read_preferences`. Raises DataError if no comparison is decided, and what
    `read_preferences` raises.
    """
    if isinstance(data, Mapping) or not isinstance(data, Iterable | Path):
        raise DataError(f"data must be a source, or a list of sources or of rows, got {show(data)}")
    sources: list[Any] = [data] if isinstance(data, str | Path) else list(data)
    if sources and isinstance(sources[0], Mapping):
        sources = [sources]  # a list of rows is one source
    reading = read_preferences(sources, max_bad_fraction=max_bad_fraction, **options)
    comparisons = Comparisons.of([group for group in reading.groups if group.comparisons])
    if not len(comparisons.decided()):
        names = ", ".join(dict.fromkeys(group.source for group in reading.groups))
        raise DataError(f"{names} hold no comparison to evaluate on")
    return reading, comparisons


@dataclass(frozen=True, slots=True)
class SetComparison:
    """What two sides get right on one source, or on all sources together."""

    name: str
    num: int  # comparisons that are not ties
    first: Estimate  # Accuracy, over all seeds if there are several
    second: Estimate | None = None
    difference: Difference | None = None  # first minus second
    p_adjusted: float | None = None
    """The difference's p-value, adjusted (Holm) for the number of sources."""


@dataclass(frozen=True, slots=True)
class ModelComparison:
    """All sets, and the models on each side."""

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
    """One set's result, from the right answers of the models of each side, or of the only side."""
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

    With several seeds on both sides, the interval is over prompts and seeds. With one model per side, it is
    the paired bootstrap's over prompts, with McNemar's exact p-value if it applies.
    """
    if len(first) > 1:  # McNemar's test cannot handle seeds
        return seeded_difference(first, second, prompts)
    estimate = paired_bootstrap(first[0], second[0], prompts)
    if first.dtype == bool and len(np.unique(prompts)) == len(prompts):
        return Difference(estimate, mcnemar(first[0], second[0]))
    # several comparisons of a prompt are not independent, as McNemar's test assumes
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
    """The sets with Holm's p-values over the sources; the last of several is their union, no other test."""
    tested = [s for s in sets[: max(1, len(sets) - 1)] if s.difference]
    p_values = holm(np.array([s.difference.p_value for s in tested if s.difference])).tolist()
    by_name = dict(zip([s.name for s in tested], p_values, strict=True))
    return tuple(replace(s, p_adjusted=by_name.get(s.name)) for s in sets)
