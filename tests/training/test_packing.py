"""Bins under a token budget, by hand and on random sizes; and errors that mean "out of memory"."""

import itertools
import random

import pytest
import torch

from hafrm.scoring.forward import first_fit_decreasing, is_out_of_memory
from hafrm.training.step_batches import plan_micro_batches, spread


def draws(num: int = 300) -> list[tuple[list[int], int]]:
    """Sizes of 1 to 30 items, one in ten of them larger than the budget."""
    rng = random.Random(0)
    cases = []
    for _ in range(num):
        budget = rng.randint(5, 60)
        top = budget if rng.random() < 0.9 else 2 * budget
        cases.append(([rng.randint(1, top) for _ in range(rng.randint(1, 30))], budget))
    return cases


def load(sizes: list[int], items: list[int]) -> int:
    return sum(sizes[i] for i in items)


def test_first_fit_decreasing_fills_the_first_bin_with_room():
    """Budget 10, in the order 8 4 4 2 1 1: the 8 opens a bin, both 4s the second, the 2 fills the first,
    the 1s the second. On random sizes no two bins would fit into one."""
    assert first_fit_decreasing([4, 8, 1, 4, 2, 1], 10) == [[1, 4], [0, 3, 2, 5]]
    assert first_fit_decreasing([3, 12, 3], 10) == [[1], [0, 2]]
    assert first_fit_decreasing([], 10) == []
    for sizes, budget in draws():
        bins = first_fit_decreasing(sizes, budget)
        assert sorted(itertools.chain(*bins)) == list(range(len(sizes)))
        assert all(load(sizes, b) <= budget or len(b) == 1 for b in bins)
        loads = sorted(load(sizes, b) for b in bins)
        assert len(bins) < 2 or loads[0] + loads[1] > budget


def test_spread_puts_each_item_into_the_lightest_of_exactly_the_bins_asked_for():
    """7, 5, 4, 3 over two bins: 7 | 5, then 4 to the 5 (9), then 3 to the 7 (10). The heaviest bin exceeded
    the lightest before its last item, never after."""
    assert spread([3, 7, 4, 5], 2) == [[1, 0], [3, 2]]
    for (sizes, _), num_bins in itertools.product(draws(50), (1, 2, 7, 40)):
        bins = spread(sizes, num_bins)
        assert len(bins) == num_bins
        assert sorted(itertools.chain(*bins)) == list(range(len(sizes)))
        loads = [load(sizes, b) for b in bins]
        assert max(loads) - min(loads) <= max(sizes)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_a_plan_holds_every_item_once_in_as_few_micro_batches_as_an_even_spread_needs(num_ranks):
    """First fit decreasing is not a lower bound: 4 3 4 5 3 3 under 11 it puts into three bins, where the
    even spread needs two (5+3+3, 4+4+3). Neighbours in load share a round."""
    assert len(plan_micro_batches([4, 3, 4, 5, 3, 3], 11)[0]) == 2
    for sizes, budget in draws():
        plan = plan_micro_batches(sizes, budget, num_ranks)
        assert len(plan) == num_ranks
        rounds = list(zip(*plan, strict=True))  # equally many on every rank
        assert sorted(i for bins in rounds for b in bins for i in b) == list(range(len(sizes)))
        limit = max(budget, *sizes)
        loads = [[load(sizes, b) for b in bins] for bins in rounds]
        assert all(load <= limit for side_by_side in loads for load in side_by_side)
        for now, following in itertools.pairwise(loads):
            assert min(now) >= max(following)
        for fewer in range(1, len(rounds)):
            bins = spread(sizes, fewer * num_ranks)
            assert max(load(sizes, b) for b in bins) > limit


def test_ranks_without_work_get_an_empty_micro_batch():
    assert plan_micro_batches([5, 3], 10, num_ranks=4) == [[[0]], [[1]], [[]], [[]]]
    assert plan_micro_batches([], 10, num_ranks=2) == [[[]], [[]]]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (torch.AcceleratorError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    ],
)
def test_a_want_of_memory_is_recognised_whichever_library_lacks_it(error, expected):
    assert is_out_of_memory(error) == expected
