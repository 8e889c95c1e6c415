"""Comparisons of test data as flat arrays, and the margins score(chosen) - score(rejected).

A comparison that annotators called a tie has no right answer: `decided` leaves it out.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from hafrm.data.files import show
from hafrm.data.reader import PreferenceData, read_preferences
from hafrm.errors import DataError, NumericsError
from hafrm.preferences import Comparison, Group, prompt_key

Margins = Float[np.ndarray, " comparisons"]
PromptKeys = Shaped[np.ndarray, " comparisons"]
"""Which prompt (any key): the clusters of the intervals."""
Indices = Int[np.ndarray, " some"]
Data = str | Path | Iterable[str | Path | Mapping[str, Any]]
"""One source or several, as `hafrm.data.reader.read_preferences` has them, or a list of rows."""


@dataclass(frozen=True)
class Comparisons:
    """Comparisons among the responses of `groups`; every array has one entry per comparison."""

    groups: Sequence[Group]
    owner: Int[np.ndarray, " comparisons"]  # index of each comparison's group
    pairs: tuple[Comparison, ...]

    @classmethod
    def of(cls, groups: Sequence[Group]) -> "Comparisons":
        """All comparisons of the groups, in their order."""
        owned = [(i, pair) for i, group in enumerate(groups) for pair in group.comparisons]
        return cls(groups, np.array([i for i, _ in owned], int), tuple(pair for _, pair in owned))

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def num_responses(self) -> int:
        """Responses of all groups: so many scores a model gives."""
        return sum(len(group.responses) for group in self.groups)

    def take(self, indices: Indices) -> "Comparisons":
        """Those at the given indices."""
        return Comparisons(self.groups, self.owner[indices], tuple(self.pairs[i] for i in indices))

    def decided(self) -> "Comparisons":
        """Those that are no ties."""
        return self.take(np.flatnonzero(~self.ties))

    def scored_by(self, *scores: Float[np.ndarray, " responses"]) -> "Comparisons":
        """Those whose responses both have a score from everybody, NaN being none."""
        if not scores:
            return self
        have = ~np.isnan(np.stack(scores)).any(0)
        first, pairs = response_offsets(self.groups)[self.owner], self.pairs
        sides = np.array([(pair.chosen, pair.rejected) for pair in pairs], int).reshape(-1, 2)
        return self.take(np.flatnonzero(have[first[:, None] + sides].all(1)))

    def by_source(self) -> dict[str, Indices]:
        """The indices of each source's comparisons, sources in their order."""
        sources = np.array([self.groups[i].source for i in self.owner], str)
        return {n: np.flatnonzero(sources == n) for n in dict.fromkeys(sources.tolist())}

    def sets(self) -> dict[str, Indices]:
        """The same, and "all" if there are several sources."""
        sources = self.by_source()
        return sources | ({"all": np.arange(len(self))} if len(sources) > 1 else {})

    def margins(self, scores: Float[np.ndarray, " responses"]) -> Margins:
        """score(chosen) - score(rejected) in float64, from one score for each response of all groups.

        Raises NumericsError for a margin that is not finite, which would silently count as wrong.
        """
        first = response_offsets(self.groups)
        assert len(scores) == first[-1], "one score for each response of each group"
        # float32 would round the difference of two large scores
        start, exact = first[self.owner], scores.astype(np.float64)
        chosen = start + np.array([pair.chosen for pair in self.pairs], int)
        rejected = start + np.array([pair.rejected for pair in self.pairs], int)
        with np.errstate(invalid="ignore"):  # inf - inf, which is reported below
            margins = exact[chosen] - exact[rejected]
        broken = np.flatnonzero(~np.isfinite(margins))
        if len(broken):
            group = self.groups[self.owner[broken[0]]].id
            raise NumericsError(
                f"{len(broken)} of {len(margins)} margins are not finite (first: a comparison of group "
                f"{group!r}); check the model's weights, or run it in float32"
            )
        return np.asarray(margins, np.float64)

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
        """The other ones."""
        return [g.responses[pair.rejected] for g, pair in self.with_groups()]

    @cached_property
    def lengths(self) -> Int[np.ndarray, "2 comparisons"]:
        """Of the chosen and the rejected response, in characters."""
        # in tokens, long responses that the model's limit cuts would seem equally long
        return np.array(
            [[*map(len, side)] for side in (self.chosen_texts, self.rejected_texts)], int
        )

    def with_groups(self) -> list[tuple[Group, Comparison]]:
        """Each comparison with its group."""
        return [(self.groups[i], pair) for i, pair in zip(self.owner, self.pairs, strict=True)]


def response_offsets(groups: Sequence[Group]) -> Int[np.ndarray, " groups_and_end"]:
    """Index of each group's first response when all responses are counted through, and their number."""
    return np.cumsum([0, *(len(group.responses) for group in groups)])


def read_comparisons(
    data: Data, max_bad_fraction: float = 0.02, **options: Any
) -> tuple[PreferenceData, Comparisons]:
    """What the data holds, and the comparisons among the groups that have some.

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
