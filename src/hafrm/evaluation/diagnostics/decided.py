"""The comparisons that people decided, as flat arrays: what every diagnostic looks at.

Ties have no right answer and are left out. Texts, votes and tags stay where they are, in the groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float, Int, Shaped
from numpy.typing import NDArray

from hafrm.errors import NumericsError
from hafrm.evaluation.diagnostics.slices import bands, vote_label
from hafrm.evaluation.evaluate import sets_of
from hafrm.preferences import Comparison, Group, prompt_key


@dataclass(frozen=True)
class Decided:
    """Every array and list has one entry per decided comparison, in the order of the groups."""

    groups: Sequence[Group]
    owner: Int[np.ndarray, " comparisons"]
    """Index of each comparison's group."""
    comparisons: tuple[Comparison, ...]

    @classmethod
    def of(cls, groups: Sequence[Group]) -> "Decided":
        """The decided comparisons of `groups`."""
        pairs = [(i, c) for i, g in enumerate(groups) for c in g.comparisons if not c.tie]
        return cls(groups, np.array([i for i, _ in pairs], int), tuple(c for _, c in pairs))

    def __len__(self) -> int:
        return len(self.comparisons)

    def of_set(self) -> dict[str, NDArray[np.int64]]:
        """The comparisons of each source, and of "all" where there are several (indices)."""
        parts = sets_of(self.groups)
        return {n: np.flatnonzero(np.isin(self.owner, part)) for n, part in parts.items()}

    def margins(self, scores: Float[np.ndarray, " responses"]) -> Float[np.ndarray, " comparisons"]:
        """score(chosen) - score(rejected), float64, from the scores of all groups' responses in order.

        Raises NumericsError for a margin that is not finite, which would silently count as wrong.
        """
        first = np.cumsum([0, *(len(group.responses) for group in self.groups)])
        assert len(scores) == first[-1], "one score for each response of each group"
        start, exact = first[self.owner], scores.astype(np.float64)
        chosen = start + np.array([c.chosen for c in self.comparisons], int)
        rejected = start + np.array([c.rejected for c in self.comparisons], int)
        with np.errstate(invalid="ignore"):
            margins = exact[chosen] - exact[rejected]
        broken = np.flatnonzero(~np.isfinite(margins))
        if len(broken):
            raise NumericsError(
                f"{len(broken)} of {len(margins)} margins are not finite (first: a comparison of group "
                f"{self.groups[self.owner[broken[0]]].id!r}); look at the model's weights or its "
                "precision before diagnosing it"
            )
        return np.asarray(margins, np.float64)

    @cached_property
    def prompts(self) -> Shaped[np.ndarray, " comparisons"]:
        """The prompt's key: the clusters of all intervals."""
        return np.array([prompt_key(group.prompt) for group, _ in self._pairs()])

    @cached_property
    def chosen(self) -> list[str]:
        """Text of the response that people preferred."""
        return [g.responses[c.chosen] for g, c in self._pairs()]

    @cached_property
    def rejected(self) -> list[str]:
        """Text of the other one."""
        return [g.responses[c.rejected] for g, c in self._pairs()]

    @cached_property
    def votes(self) -> Float[np.ndarray, "comparisons outcomes"]:
        """Judges for chosen, rejected and tie; NaN where nobody counted."""
        rows = [[np.nan] * 3 if c.votes is None else list(c.votes) for c in self.comparisons]
        return np.array(rows, np.float64).reshape(-1, 3)

    def divisions(self, rows: Int[np.ndarray, " comparisons"]) -> dict[str, list[str]]:
        """What divides the comparisons in `rows`: their data's tags and what can be counted."""
        groups = [self.groups[self.owner[row]] for row in rows]
        comparisons = [self.comparisons[row] for row in rows]
        tags = sorted({tag for group in groups for tag in group.tags})
        found = {tag: [group.tags.get(tag, "(none)") for group in groups] for tag in tags}
        words = [sum(len(message.content.split()) for message in g.prompt) for g in groups]
        turns = [sum(message.role == "user" for message in g.prompt) for g in groups]
        found["prompt length"] = bands(np.array(words), "words")
        found["user turns"] = bands(np.array(turns))
        found["margin by people"] = bands(np.array([c.margin for c in comparisons]))
        found["votes"] = [vote_label(c.votes) for c in comparisons]
        return found

    def _pairs(self) -> list[tuple[Group, Comparison]]:
        return [(self.groups[i], c) for i, c in zip(self.owner, self.comparisons, strict=True)]
