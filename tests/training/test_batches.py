"""A step holds exactly `batch_size` comparisons, whatever the epochs, prompts and ranks."""

from collections import Counter

import numpy as np
import pytest

from hafrm.preferences import Comparison, TokenizedGroup
from hafrm.training.step_batches import (
    ComparisonOrder,
    ComparisonRef,
    Prefetch,
    References,
    build_micro_batch,
    plan_step,
)
from support.models import token_groups
from support.step_pairs import pairs


def groups_of(*comparisons: int) -> list[TokenizedGroup]:
    """Groups of as many responses as they need, the first preferred over each of the others."""
    shapes = [(3 + i, tuple(2 + k for k in range(n + 1))) for i, n in enumerate(comparisons)]
    return [
        TokenizedGroup(
            id=f"g{i}",
            prompt_ids=tokens.prompt_ids,
            response_ids=tokens.response_ids,
            comparisons=tuple(Comparison(0, k + 1, margin=float(k)) for k in range(n)),
            source="test",
            tags={},
        )
        for i, (tokens, n) in enumerate(zip(token_groups(shapes), comparisons, strict=True))
    ]


def epoch(order: ComparisonOrder, number: int) -> list[ComparisonRef]:
    return order.window(number * order.num_comparisons, order.num_comparisons)


@pytest.mark.parametrize("per_prompt", [1, 2, 4])
def test_the_order_is_the_one_of_lists_of_runs_that_are_permuted(per_prompt):
    """The order as first released, in lists: what old seeds gave, they give for ever."""
    groups = groups_of(1, 5, 0, 2, 1, 9, 1)
    order = ComparisonOrder(groups, per_prompt=per_prompt, seed=7)
    for number in range(3):
        rng, runs = np.random.default_rng([7, number]), []
        for index, group in enumerate(groups):
            own = range(len(group.comparisons))
            tiled = order._tiled(index, own, rng) if len(own) > 1 else own
            refs = [ComparisonRef(index, c) for c in tiled]
            runs += [refs[i : i + per_prompt] for i in range(0, len(refs), per_prompt)]
        expected = [ref for run in rng.permutation(len(runs)) for ref in runs[run]]
        assert epoch(order, number) == expected


def test_an_epoch_holds_every_comparison_once_and_windows_run_on_into_the_next():
    order = ComparisonOrder(groups_of(1, 5, 2, 1), per_prompt=2, seed=3)
    assert order.num_comparisons == 9
    assert Counter(epoch(order, 0)) == Counter(
        ComparisonRef(g, c) for g, n in enumerate((1, 5, 2, 1)) for c in range(n)
    )
    windows = [order.window(4 * step, 4) for step in range(9)]
    assert all(len(window) == 4 for window in windows)
    assert [p for w in windows for p in w] == [p for e in range(4) for p in epoch(order, e)]
    assert order.reached(4) == order.window(0, 4)
    assert order.reached(100) == epoch(order, 0)


def test_the_order_is_a_function_of_seed_and_epoch():
    groups = groups_of(1, 5, 2, 1)
    first, again, other = (ComparisonOrder(groups, per_prompt=2, seed=s) for s in (1, 1, 2))
    assert epoch(first, 0) == epoch(again, 0)
    assert epoch(first, 0) != epoch(first, 1)
    assert epoch(first, 0) != epoch(other, 0)


def test_comparisons_of_a_prompt_travel_in_blocks_of_at_most_per_prompt():
    picks = epoch(ComparisonOrder(groups_of(6, 6, 6), per_prompt=3, seed=0), 0)
    blocks = [picks[i : i + 3] for i in range(0, len(picks), 3)]
    assert all(len({pick.group for pick in block}) == 1 for block in blocks)


def test_ties_are_left_out():
    (group,) = groups_of(2)
    tie = Comparison(0, 1, tie=True)
    mixed = TokenizedGroup(group.prompt_ids, group.response_ids, (tie, Comparison(0, 2)), "t")
    assert epoch(ComparisonOrder([mixed], per_prompt=1, seed=0), 0) == [ComparisonRef(0, 1)]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_every_rank_gets_as_many_micro_batches_and_fillers_weigh_nothing(ranks):
    groups = groups_of(1, 3, 1)
    picks = epoch(ComparisonOrder(groups, per_prompt=4, seed=0), 0)
    plan = plan_step(groups, picks, max_tokens=20, num_ranks=ranks)
    assert len({len(rank) for rank in plan}) == 1
    batches = [build_micro_batch(parts) for rank in plan for parts in rank]
    assert sum(int((batch.weights != 0).sum()) for batch in batches) == len(picks)
    assert all(batch.layout.num_tokens > 0 for batch in batches)


def test_a_step_lays_out_each_distinct_response_once():
    """Three comparisons among four responses of one prompt: 5 tokens of prompt, 2+3+4+5 of responses."""
    (group,) = groups_of(3)
    picks = [ComparisonRef(0, c) for c in range(3)]
    ((parts,),) = plan_step([group], picks, max_tokens=1000)
    assert build_micro_batch(parts).layout.num_tokens == 3 + (2 + 3 + 4 + 5)


def test_indices_margins_weights_and_references_point_at_the_right_responses():
    groups = groups_of(1, 3)
    references = References(np.arange(6, dtype=np.float32) * 10, np.array([0, 2]))
    picks = [ComparisonRef(1, 2), ComparisonRef(0, 0), ComparisonRef(1, 0)]
    ((parts,),) = plan_step(groups, picks, max_tokens=1000)
    batch = build_micro_batch(parts, references)
    assert batch.reference_logps is not None
    seen = set()
    for i, name in enumerate(batch.ids):
        chosen, rejected = int(batch.chosen[i]), int(batch.rejected[i])
        seen.add(
            (
                name,
                float(batch.margins[i]),
                float(batch.reference_logps[chosen]),
                float(batch.reference_logps[rejected]),
                int(batch.layout.lengths[rejected]),
            )
        )
    assert seen == {
        ("g1", 2.0, 20.0, 50.0, 5),
        ("g1", 0.0, 20.0, 30.0, 3),
        ("g0", 0.0, 0.0, 10.0, 3),
    }


def test_steps_come_in_order_and_the_next_one_is_built_while_this_one_runs():
    groups = pairs()
    order = ComparisonOrder(groups, per_prompt=1, seed=0)

    def build(step):
        plan = plan_step(groups, order.window(8 * step, 8), 40)
        return [build_micro_batch(batch) for batch in plan[0]]

    with Prefetch(build) as source:
        steps = [source.take(step) for step in range(2)]
        step, upcoming = source._ahead
        assert step == 2
        assert source.take(2) is upcoming.result()
    batches = [batch for step in steps for batch in step]
    assert len(batches) > 4
    names = Counter(name for batch in batches for name in batch.ids)
    assert names == Counter(f"g{i}" for i in range(16))
    assert max(batch.layout.num_tokens for batch in batches) <= 40
