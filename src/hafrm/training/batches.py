"""Which comparisons make up a step, and how they are packed: index arithmetic, no model.

The order of comparisons is a pure function of (seed, epoch), and a step is a window of exactly
`batch_size` comparisons on that endless order, so resuming needs only the step's number and no packing
changes what is learnt. Comparisons of one prompt travel in blocks that have few distinct responses, because
a step lays out each of those once.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from hafrm.engine.layout import Layout, lay_out
from hafrm.engine.packing import plan_micro_batches
from hafrm.errors import DataError
from hafrm.preferences import TokenizedGroup


@dataclass(frozen=True)
class MicroBatch:
    """The comparisons of one forward, as indices into its layout's responses."""

    layout: Layout
    chosen: Int[Tensor, " comparisons"]
    rejected: Int[Tensor, " comparisons"]
    margins: Float[Tensor, " comparisons"]
    weights: Float[Tensor, " comparisons"]
    """Zero in the filler that a rank without work runs for the others' sake."""
    reference_logps: Float[Tensor, " responses"] | None
    ids: tuple[str, ...]
    """The group of every comparison, for messages."""

    def pinned(self) -> "MicroBatch":
        """The same micro-batch in page-locked memory, from which copies to a GPU do not wait."""
        return self._with(self.layout.pinned(), lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device) -> "MicroBatch":
        """The same micro-batch on `device`; asynchronous when it is pinned."""
        if device.type == "cpu":
            return self
        move = functools.partial(Tensor.to, device=device, non_blocking=True)
        return self._with(self.layout.to(device), move)

    def _with(self, layout: Layout, move: Callable[[Tensor], Tensor]) -> "MicroBatch":
        names = ("chosen", "rejected", "margins", "weights", "reference_logps")
        values = {name: getattr(self, name) for name in names}
        moved: dict[str, Any] = {n: move(v) for n, v in values.items() if v is not None}
        return replace(self, layout=layout, **moved)


@dataclass(frozen=True)
class Pick:
    """One comparison of one group, by index."""

    group: int
    comparison: int


class ComparisonOrder:
    """The endless, seeded order in which comparisons are trained on; ties are left out."""

    def __init__(self, groups: Sequence[TokenizedGroup], *, per_prompt: int, seed: int) -> None:
        """Raises DataError when there is nothing to train on."""
        self._blocks_of = [
            [c for c, comparison in enumerate(group.comparisons) if not comparison.tie]
            for group in groups
        ]
        self._groups, self._per_prompt, self._seed = groups, per_prompt, seed
        self.num_comparisons = sum(len(block) for block in self._blocks_of)
        if self.num_comparisons == 0:
            raise DataError(
                f"there is no comparison to train on: {len(groups)} groups hold only ties or single "
                "responses; give data.train rows with a chosen and a rejected response"
            )

    @functools.lru_cache(maxsize=2)  # noqa: B019 - lives as long as the run
    def epoch(self, number: int) -> list[Pick]:
        """All comparisons once, blocks of at most `per_prompt` of one prompt together."""
        draw = np.random.default_rng([self._seed, number])
        blocks: list[list[Pick]] = []
        for group, comparisons in enumerate(self._blocks_of):
            ordered = [Pick(group, c) for c in self._tiled(group, comparisons, draw)]
            blocks += [
                ordered[i : i + self._per_prompt] for i in range(0, len(ordered), self._per_prompt)
            ]
        return [pick for block in draw.permutation(len(blocks)) for pick in blocks[block]]

    def _tiled(
        self, group: int, comparisons: Sequence[int], draw: np.random.Generator
    ) -> list[int]:
        """A prompt's comparisons in random order, but neighbours share responses.

        Responses get random ranks, and the table of comparisons is read tile by tile, s x s ranks each
        with s^2 = per_prompt: up to s^2 comparisons then have 2 s responses, not 2 s^2.
        """
        shuffled = [int(c) for c in draw.permutation(comparisons)]
        if len(shuffled) <= 1:
            return shuffled
        side = max(1, round(self._per_prompt**0.5))
        pairs = self._groups[group].comparisons
        rank = draw.permutation(len(self._groups[group].response_ids)) // side

        def tile(comparison: int) -> tuple[bool, int, int]:
            ranks = (int(rank[pairs[comparison].chosen]), int(rank[pairs[comparison].rejected]))
            # Tiles on the diagonal are half empty and would shift the others out of step with blocks.
            return ranks[0] == ranks[1], min(ranks), max(ranks)

        return sorted(shuffled, key=tile)

    def window(self, start: int, length: int) -> list[Pick]:
        """`length` comparisons from position `start` of the endless order, across epochs."""
        picks: list[Pick] = []
        while len(picks) < length:
            epoch, offset = divmod(start + len(picks), self.num_comparisons)
            picks += self.epoch(epoch)[offset : offset + length - len(picks)]
        return picks

    def reached(self, length: int) -> list[Pick]:
        """The comparisons among the first `length` of the endless order, each once."""
        return self.window(0, min(length, self.num_comparisons))


@dataclass(frozen=True)
class References:
    """Cached reference log-probs of the responses of a data set, in its order."""

    logps: NDArray[np.float32]
    """NaN for a response that the run never reaches."""
    first: NDArray[np.int64]
    """Index of each group's first response in `logps`."""


@dataclass(frozen=True)
class Chosen:
    """The part of one group that a step uses: its distinct responses, its comparisons re-indexed."""

    group: TokenizedGroup
    used: tuple[int, ...]
    comparisons: tuple[int, ...]
    index: int

    @property
    def prompt_ids(self) -> NDArray[np.int32]:
        return self.group.prompt_ids

    @property
    def response_ids(self) -> tuple[NDArray[np.int32], ...]:
        return tuple(self.group.response_ids[i] for i in self.used)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + sum(len(ids) for ids in self.response_ids)


def plan_step(
    groups: Sequence[TokenizedGroup], picks: Sequence[Pick], max_tokens: int, num_ranks: int = 1
) -> list[list[list[Chosen]]]:
    """`plan[rank][micro_batch]` -> the parts of groups to run; equal in number on every rank."""
    parts = _chosen(groups, picks)
    plan = plan_micro_batches([part.num_tokens for part in parts], max_tokens, num_ranks)
    filler = min(parts, key=lambda part: part.num_tokens)
    empty = replace(filler, comparisons=())
    return [[[parts[i] for i in batch] or [empty] for batch in rank] for rank in plan]


def num_tokens_of(groups: Sequence[TokenizedGroup], picks: Sequence[Pick]) -> list[int]:
    """Packed tokens of each group that a step uses, only the responses that are compared."""
    return [part.num_tokens for part in _chosen(groups, picks)]


def used_responses(
    groups: Sequence[TokenizedGroup], picks: Sequence[Pick]
) -> dict[int, tuple[int, ...]]:
    """The responses of each picked group that its picks compare, in rising order."""
    used: dict[int, set[int]] = {}
    for pick in picks:
        comparison = groups[pick.group].comparisons[pick.comparison]
        used.setdefault(pick.group, set()).update((comparison.chosen, comparison.rejected))
    return {index: tuple(sorted(responses)) for index, responses in used.items()}


def _chosen(groups: Sequence[TokenizedGroup], picks: Sequence[Pick]) -> list[Chosen]:
    by_group: dict[int, list[int]] = {}
    for pick in picks:
        by_group.setdefault(pick.group, []).append(pick.comparison)
    return [
        Chosen(groups[index], used, tuple(by_group[index]), index)
        for index, used in used_responses(groups, picks).items()
    ]


def build(parts: Sequence[Chosen], references: References | None = None) -> MicroBatch:
    """Lay out one micro-batch; a part without comparisons gets one of weight zero."""
    chosen, rejected, margins, weights = [], [], [], []
    reference: list[NDArray[np.float32]] = []
    ids: list[str] = []
    offset = 0
    for part in parts:
        place = {response: offset + i for i, response in enumerate(part.used)}
        for c in part.comparisons or range(1):
            comparison = part.group.comparisons[c] if part.comparisons else None
            chosen.append(place[comparison.chosen] if comparison else offset)
            rejected.append(place[comparison.rejected] if comparison else offset)
            margins.append(comparison.margin if comparison else 0.0)
            weights.append(comparison.weight if comparison else 0.0)
            ids.append(part.group.id)
        if references is not None:
            reference.append(references.logps[references.first[part.index] + np.array(part.used)])
        offset += len(part.used)
    return MicroBatch(
        layout=lay_out(parts),
        chosen=torch.tensor(chosen),
        rejected=torch.tensor(rejected),
        margins=torch.tensor(margins, dtype=torch.float32),
        weights=torch.tensor(weights, dtype=torch.float32),
        reference_logps=torch.from_numpy(np.concatenate(reference)) if reference else None,
        ids=tuple(ids),
    )
