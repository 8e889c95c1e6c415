"""Micro-batches come one step ahead, and a smaller budget changes the packing but not the step."""

from collections import Counter

import torch

from hafrm.training.parallel import Ranks
from hafrm.training.runtime import Prefetch
from hafrm.training.step_batches import ComparisonOrder, MicroBatch
from support.step_pairs import pairs

ALONE = Ranks(0, 1, torch.device("cpu"))


def feed(max_tokens: int) -> Prefetch:
    groups = pairs()
    order = ComparisonOrder(groups, per_prompt=1, seed=0)
    return Prefetch(groups, order, None, batch_size=8, max_tokens=max_tokens, ranks=ALONE)


def members(batches: list[MicroBatch]) -> Counter[str]:
    return Counter(name for batch in batches for name in batch.ids)


def test_steps_come_in_order_and_two_make_an_epoch_of_sixteen():
    with feed(1000) as source:
        steps = [source.take(step) for step in range(2)]
    assert members(steps[0]) + members(steps[1]) == Counter(f"g{i}" for i in range(16))


def test_the_next_step_is_built_while_this_one_runs():
    with feed(1000) as source:
        source.take(3)
        step, budget, upcoming = source._ahead
        assert (step, budget) == (4, 1000)
        assert source.take(4) is upcoming.result()


def test_half_the_budget_gives_the_same_comparisons_in_smaller_micro_batches():
    with feed(100) as source:
        before = source.take(0)
        assert source.halve(0)
        after = source.take(0)
    assert source.max_tokens == 50
    assert members(before) == members(after)
    assert max(batch.layout.num_tokens for batch in after) <= 50
    assert len(after) > len(before)


def test_a_budget_below_the_largest_group_is_not_halved_any_further():
    with feed(100) as source:
        while source.halve(0):
            pass
        largest = max(batch.layout.num_tokens for batch in source.take(0))
        assert largest // 2 < source.max_tokens <= largest


def test_leaving_waits_for_no_step():
    with feed(1000) as source:
        source.take(0)
    assert source._worker._shutdown
