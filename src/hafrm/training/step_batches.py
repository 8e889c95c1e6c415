"""Which comparisons make up a step, and how they are packed: index arithmetic, no model.

The order is a pure function of (seed, epoch), and a step is a window of exactly `batch_size` comparisons in
it: a resumed run needs only the step's number, and packing cannot change what is learned.
"""

import functools
import heapq
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from hafrm.data.store import counts_of
from hafrm.engine.layout import Layout, lay_out
from hafrm.preferences import TokenizedGroup


@dataclass(frozen=True)
class MicroBatch:
    """The comparisons of one forward, as indices into its layout's responses."""

    layout: Layout
    chosen: Int[Tensor, " comparisons"]
    rejected: Int[Tensor, " comparisons"]
    margins: Float[Tensor, " comparisons"]
    weights: Float[Tensor, " comparisons"]  # 0 in the filler of a rank that has nothing left
    reference_logps: Float[Tensor, " responses"] | None
    ids: tuple[str, ...]  # the group of every comparison, for messages

    def to(self, device: torch.device) -> "MicroBatch":
        if device.type == "cpu":
            return self
        return self.moved(lambda tensor: tensor.to(device, non_blocking=True))

    def moved(self, move: Callable[[Tensor], Tensor]) -> "MicroBatch":
        moved: dict[str, Any] = {k: move(v) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, layout=self.layout.moved(move), **moved)


class ComparisonRef(NamedTuple):
    """One comparison, by the index of its group and its own index in it."""

    group: int
    comparison: int


class ComparisonOrder:
    """The endless, seeded order in which comparisons are trained on; ties are left out.

    Comparisons of one prompt stay together in runs with few distinct responses, because a step lays out
    each response once.
    """

    def __init__(self, groups: Sequence[TokenizedGroup], *, per_prompt: int, seed: int) -> None:
        self._groups, self._per_prompt, self._seed = groups, per_prompt, seed
        sizes = counts_of(groups, "comparisons")
        ends = np.cumsum(sizes)
        owners = np.repeat(np.arange(len(groups)), sizes)
        decided = np.ones(len(owners), np.bool_)
        for index in np.flatnonzero(counts_of(groups, "ties")).tolist():
            pairs = groups[index].comparisons
            decided[ends[index] - len(pairs) : ends[index]] = [not pair.tie for pair in pairs]
        self._owners = owners[decided]
        self._comparisons = (np.arange(len(owners)) - np.repeat(ends - sizes, sizes))[decided]
        self.num_comparisons = len(self._owners)

    @functools.lru_cache(maxsize=2)  # noqa: B019 - lives as long as the run
    def _epoch(self, number: int) -> NDArray[np.int64]:
        """(group, comparison) of all comparisons once, at most `per_prompt` of one prompt in a run."""
        rng = np.random.default_rng([self._seed, number])
        ordered = self._comparisons.copy()
        owners, first, sizes = np.unique(self._owners, return_index=True, return_counts=True)
        for place in np.flatnonzero(sizes > 1).tolist():  # one comparison alone draws no number
            part = slice(first[place], first[place] + sizes[place])
            ordered[part] = self._tiled(int(owners[place]), ordered[part].tolist(), rng)
        within = np.arange(len(ordered)) - np.repeat(first, sizes)
        starts = np.flatnonzero(within % self._per_prompt == 0)
        drawn = rng.permutation(len(starts))
        lengths = np.diff(starts, append=len(ordered))[drawn]
        places = np.repeat(starts[drawn] - (np.cumsum(lengths) - lengths), lengths)
        places += np.arange(len(ordered))
        return np.stack([self._owners[places], ordered[places]], axis=1)

    def _tiled(self, group: int, comparisons: Sequence[int], rng: np.random.Generator) -> list[int]:
        """A prompt's comparisons in random order, but neighbours share responses: the table of randomly
        ranked responses is read in s x s tiles (s^2 = per_prompt), which need 2 s responses, not 2 s^2."""
        shuffled = [int(c) for c in rng.permutation(comparisons)]
        side = max(1, round(self._per_prompt**0.5))
        pairs = self._groups[group].comparisons
        rank = rng.permutation(len(self._groups[group].response_ids)) // side

        def tile(comparison: int) -> tuple[bool, int, int]:
            ranks = (int(rank[pairs[comparison].chosen]), int(rank[pairs[comparison].rejected]))
            # Tiles on the diagonal are half empty; first in order, they would misalign the others.
            return ranks[0] == ranks[1], min(ranks), max(ranks)

        return sorted(shuffled, key=tile)

    def window(self, start: int, length: int) -> list[ComparisonRef]:
        """`length` comparisons from position `start` of the endless order, across epochs."""
        refs: list[ComparisonRef] = []
        while len(refs) < length:
            epoch, offset = divmod(start + len(refs), self.num_comparisons)
            rows = self._epoch(epoch)[offset : offset + length - len(refs)]
            refs += [ComparisonRef(group, comparison) for group, comparison in rows.tolist()]
        return refs

    def reached(self, length: int) -> list[ComparisonRef]:
        """The comparisons among the first `length` of the endless order, each once."""
        return self.window(0, min(length, self.num_comparisons))


@dataclass(frozen=True)
class References:
    """Cached reference log-probs of the responses of a data set, in its order."""

    logps: NDArray[np.float32]  # NaN for a response that the run never reaches
    first: NDArray[np.int64]  # index of each group's first response in `logps`


class StepGroup(NamedTuple):
    """What a step uses of one group."""

    tokens: TokenizedGroup  # only what the step compares
    group_index: int  # of the whole group in the data set
    responses: tuple[int, ...]  # index of each response in the whole group, in rising order


def plan_step(
    groups: Sequence[TokenizedGroup],
    refs: Sequence[ComparisonRef],
    max_tokens: int,
    num_ranks: int = 1,
) -> list[list[list[StepGroup]]]:
    """`plan[rank][micro_batch]`: the groups of each forward; every rank has the same number of forwards."""
    used = step_groups(groups, refs)
    plan = plan_micro_batches([group.tokens.num_tokens for group in used], max_tokens, num_ranks)
    shortest = min(used, key=lambda group: group.tokens.num_tokens)
    filler = shortest._replace(tokens=replace(shortest.tokens, comparisons=()))
    return [[[used[i] for i in batch] or [filler] for batch in rank] for rank in plan]


def plan_micro_batches(
    sizes: Sequence[int], budget: int, num_ranks: int = 1
) -> list[list[list[int]]]:
    """`plan[rank][micro_batch]` -> indices: the fewest micro-batches per rank (some may be empty) that an
    even spread under `budget` (or under the largest single item) allows."""
    limit = max([budget, *sizes])
    rounds = max(1, -(-sum(sizes) // (limit * num_ranks)))
    while True:
        bins = spread(sizes, rounds * num_ranks)
        if max(sum(sizes[i] for i in b) for b in bins) <= limit:
            break
        rounds += 1
    bins.sort(key=lambda b: -sum(sizes[i] for i in b))
    # Micro-batches of similar load run side by side, so that no rank waits long for another.
    return [[bins[r * num_ranks + rank] for r in range(rounds)] for rank in range(num_ranks)]


def spread(sizes: Sequence[int], num_bins: int) -> list[list[int]]:
    """Exactly `num_bins` bins, some maybe empty: each item, largest first, goes into the lightest bin."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    lightest = [(0, b) for b in range(num_bins)]
    for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        load, b = heapq.heappop(lightest)
        bins[b].append(item)
        heapq.heappush(lightest, (load + sizes[item], b))
    return bins


def step_groups(groups: Sequence[TokenizedGroup], refs: Sequence[ComparisonRef]) -> list[StepGroup]:
    """The referenced comparisons by group, each group cut to the responses that they compare."""
    return [step_group(groups, *own) for own in comparisons_by_group(refs).items()]


def comparisons_by_group(refs: Iterable[ComparisonRef]) -> dict[int, list[int]]:
    """The indices of each group's comparisons, by the group's index."""
    by_group: dict[int, list[int]] = {}
    for ref in refs:
        by_group.setdefault(ref.group, []).append(ref.comparison)
    return by_group


def step_group(groups: Sequence[TokenizedGroup], index: int, refs: Sequence[int]) -> StepGroup:
    """One group, cut to the responses that these of its comparisons compare."""
    group = groups[index]
    comparisons = [group.comparisons[c] for c in refs]
    used = sorted({side for c in comparisons for side in (c.chosen, c.rejected)})
    place = {response: i for i, response in enumerate(used)}
    moved = [replace(c, chosen=place[c.chosen], rejected=place[c.rejected]) for c in comparisons]
    ids = tuple(group.response_ids[i] for i in used)
    tokens = replace(group, response_ids=ids, comparisons=tuple(moved))
    return StepGroup(tokens, index, tuple(used))


def build_micro_batch(
    groups: Sequence[StepGroup], references: References | None = None
) -> MicroBatch:
    """Lay out one micro-batch; a group without comparisons gets one of weight zero."""
    rows: list[tuple[int, int, float, float]] = []  # chosen, rejected, margin, weight
    reference: list[NDArray[np.float32]] = []
    ids: list[str] = []
    offset = 0
    for group in groups:
        for c in group.tokens.comparisons:
            rows.append((offset + c.chosen, offset + c.rejected, c.margin, c.weight))
        if not group.tokens.comparisons:  # filler: a response against itself
            rows.append((offset, offset, 0.0, 0.0))
        ids += [group.tokens.id] * max(1, len(group.tokens.comparisons))
        if references is not None:
            start = references.first[group.group_index]
            reference.append(references.logps[start + np.array(group.responses)])
        offset += len(group.responses)
    chosen, rejected, margins, weights = zip(*rows, strict=True)
    return MicroBatch(
        layout=lay_out([group.tokens for group in groups]),
        chosen=torch.tensor(chosen),
        rejected=torch.tensor(rejected),
        margins=torch.tensor(margins, dtype=torch.float32),
        weights=torch.tensor(weights, dtype=torch.float32),
        reference_logps=torch.from_numpy(np.concatenate(reference)) if reference else None,
        ids=tuple(ids),
    )


class Prefetch(AbstractContextManager["Prefetch"]):
    """The micro-batches of each step, built by `build` one step ahead in a thread; a context manager."""

    def __init__(self, build: Callable[[int], list[MicroBatch]]) -> None:
        self._build = build
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="hafrm-prefetch")
        self._ahead: tuple[int, Future[list[MicroBatch]]] | None = None

    def __exit__(self, *_: object) -> None:
        self._worker.shutdown(cancel_futures=True)

    def take(self, step: int) -> list[MicroBatch]:
        """The micro-batches of `step`; a thread starts to build those of the next step."""
        ready = self._ahead is not None and self._ahead[0] == step
        batches = self._ahead[1].result() if self._ahead and ready else self._build(step)
        self._ahead = (step + 1, self._worker.submit(self._build, step + 1))
        return batches
