"""Bins under a token budget, by hand and on random sizes; and errors that mean "out of memory"."""

import itertools
import random

import pytest
import torch

from hafrm.engine.packing import first_fit_decreasing, is_out_of_memory, plan_micro_batches, spread


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
    """Budget 10, taken in the order 8 4 4 2 1 1: the 8 opens a bin, both 4s the second, the 2 fills
    the first, the 1s the second. Equal sizes keep their order."""
    assert first_fit_decreasing([4, 8, 1, 4, 2, 1], 10) == [[1, 4], [0, 3, 2, 5]]
    assert first_fit_decreasing([3, 12, 3], 10) == [[1], [0, 2]]
    assert first_fit_decreasing([], 10) == []


def test_first_fit_decreasing_keeps_the_budget_and_no_two_bins_would_fit_into_one():
    """First fit opens a bin only when the item fits nowhere, so any two together exceed the budget."""
    for sizes, budget in draws():
        bins = first_fit_decreasing(sizes, budget)
        assert sorted(i for b in bins for i in b) == list(range(len(sizes)))
        assert all(load(sizes, b) <= budget or len(b) == 1 for b in bins)
        loads = sorted(load(sizes, b) for b in bins)
        assert len(bins) < 2 or loads[0] + loads[1] > budget


def test_spread_puts_each_item_into_the_lightest_bin():
    """7, 5, 4, 3 over two bins: 7 | 5, then 4 to the 5 (9), then 3 to the 7 (10)."""
    assert spread([3, 7, 4, 5], 2) == [[1, 0], [3, 2]]


def test_spread_uses_exactly_the_bins_asked_for():
    for sizes, _ in draws(100):
        for num_bins in (1, 2, 7, 40):
            bins = spread(sizes, num_bins)
            assert len(bins) == num_bins
            assert sorted(i for b in bins for i in b) == list(range(len(sizes)))
            loads = [load(sizes, b) for b in bins]
            # The heaviest bin exceeded the lightest before its last item, never after.
            assert max(loads) - min(loads) <= max(sizes)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_a_plan_holds_every_item_once_in_as_few_micro_batches_as_an_even_spread_needs(num_ranks):
    """First fit decreasing is not a lower bound: 4 3 4 5 3 3 under 11 it puts into three bins, where
    the even spread needs two (5+3+3, 4+4+3)."""
    assert len(plan_micro_batches([4, 3, 4, 5, 3, 3], 11)[0]) == 2
    for sizes, budget in draws():
        plan = plan_micro_batches(sizes, budget, num_ranks)
        assert len(plan) == num_ranks
        assert len({len(batches) for batches in plan}) == 1
        items = [i for batches in plan for batch in batches for i in batch]
        assert sorted(items) == list(range(len(sizes)))
        limit = max(budget, *sizes)
        assert all(load(sizes, batch) <= limit for batches in plan for batch in batches)
        for fewer in range(1, len(plan[0])):
            bins = spread(sizes, fewer * num_ranks)
            assert max(load(sizes, b) for b in bins) > limit


def test_ranks_that_run_side_by_side_have_like_loads():
    """Neighbours in load share a round: a round's lightest is no lighter than the next's heaviest."""
    for sizes, budget in draws(100):
        plan = plan_micro_batches(sizes, budget, 2)
        rounds = [[load(sizes, batches[r]) for batches in plan] for r in range(len(plan[0]))]
        for now, following in itertools.pairwise(rounds):
            assert min(now) >= max(following)


def test_ranks_without_work_get_an_empty_micro_batch():
    assert plan_micro_batches([5, 3], 10, num_ranks=4) == [[[0]], [[1]], [[]], [[]]]
    assert plan_micro_batches([], 10, num_ranks=2) == [[[]], [[]]]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
    ],
)
def test_a_want_of_memory_is_recognised_whichever_library_lacks_it(error):
    assert is_out_of_memory(error)


def test_other_errors_are_no_want_of_memory():
    assert not is_out_of_memory(
        RuntimeError("CUDA error: an illegal memory access was encountered")
    )
