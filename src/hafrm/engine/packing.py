"""Which groups run in one forward: bins under a token budget; and what to do when memory still runs out.

First-fit decreasing packs a stream of groups into few sequences; a training step is spread evenly over
the same number of micro-batches on every rank. Sizes in, indices out.
"""

import gc
import heapq
from collections.abc import Sequence

import torch


def first_fit_decreasing(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of the items in each bin; a bin exceeds `budget` only to hold a single larger item."""
    bins: list[list[int]] = []
    space: list[int] = []
    for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        fit = next((b for b, left in enumerate(space) if sizes[item] <= left), None)
        if fit is None:
            bins.append([item])
            space.append(budget - sizes[item])
        else:
            bins[fit].append(item)
            space[fit] -= sizes[item]
    return bins


def plan_micro_batches(
    sizes: Sequence[int], budget: int, num_ranks: int = 1
) -> list[list[list[int]]]:
    """`plan[rank][micro_batch]` -> indices: as few micro-batches, some of them empty, as an even spread
    under `budget` (or under the largest single item) needs, and the same number on every rank."""
    limit = max([budget, *sizes])
    rounds = max(1, -(-sum(sizes) // (limit * num_ranks)))
    while True:
        bins = spread(sizes, rounds * num_ranks)
        if max(sum(sizes[i] for i in b) for b in bins) <= limit:
            break
        rounds += 1
    bins.sort(key=lambda b: -sum(sizes[i] for i in b))
    # Neighbours in load run side by side, so that no rank waits long for another.
    return [[bins[r * num_ranks + rank] for r in range(rounds)] for rank in range(num_ranks)]


def spread(sizes: Sequence[int], num_bins: int) -> list[list[int]]:
    """Exactly `num_bins` bins, some empty for want of items: each item, largest first, in the lightest."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    lightest = [(0, b) for b in range(num_bins)]
    for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        load, b = heapq.heappop(lightest)
        bins[b].append(item)
        heapq.heappush(lightest, (load + sizes[item], b))
    return bins


# of errors of other types: a CPU's, and those of CUDA and its libraries beside torch's allocator
_OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a pass failed for want of memory, on any device."""
    return isinstance(error, torch.OutOfMemoryError) or any(
        text in str(error) for text in _OUT_OF_MEMORY
    )


def free_memory() -> None:
    """Free what a failed pass left behind; call it when its exception is gone, which holds tensors."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
