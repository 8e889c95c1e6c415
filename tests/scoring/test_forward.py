"""The bulk path: what is shared, cut and run side by side changes no score, only the work."""

import numpy as np
import pytest
import torch

from hafrm.engine.layout import lay_out
from hafrm.errors import MemoryBudgetError, NumericsError
from hafrm.preferences import TokenizedGroup
from hafrm.scoring.forward import plan_sequences, run_forward, share_prompts
from support.live_bytes import short_of_memory
from support.models import SHAPES, TokenGroup, tiny_hybrid, token_groups

GROUPS = token_groups(SHAPES)
NUM_RESPONSES = sum(len(group.response_ids) for group in GROUPS)
TOLERANCE = {"atol": 2e-5, "rtol": 1e-5}
"""float32 sums in another order; log-probs are sums of up to 13 tokens."""


@pytest.fixture(scope="module")
def model():
    return tiny_hybrid().eval()


@pytest.fixture(scope="module")
def alone(model):
    """Rewards and log-probs of every response, one forward each."""
    single = [TokenGroup(g.prompt_ids, (ids,)) for g in GROUPS for ids in g.response_ids]
    with torch.no_grad():
        outputs = [model(lay_out([group])) for group in single]
    return [np.array([float(getattr(o, name)) for o in outputs]) for name in ("rewards", "logps")]


@pytest.mark.parametrize(("max_tokens", "threads"), [(1, 3), (15, 1), (40, 3), (10_000, 1)])
def test_scores_depend_on_neither_the_row_size_nor_the_threads(model, alone, max_tokens, threads):
    before = torch.get_num_threads()
    scores = run_forward(model, GROUPS, max_tokens=max_tokens, threads=threads)
    np.testing.assert_allclose(scores.rewards, alone[0], **TOLERANCE)
    np.testing.assert_allclose(scores.logps, alone[1], **TOLERANCE)
    assert scores.lengths.tolist() == [len(ids) for g in GROUPS for ids in g.response_ids]
    assert torch.get_num_threads() == before


def test_rows_that_share_a_prompt_are_laid_out_once_and_keep_their_places(model, alone):
    """Every response as a row of its own, shuffled: the prompts are found again by their ids."""
    single = [TokenGroup(g.prompt_ids.copy(), (ids,)) for g in GROUPS for ids in g.response_ids]
    order = np.random.default_rng(0).permutation(len(single))
    shuffled, reported = [single[i] for i in order], []
    scores = run_forward(
        model, shuffled, max_tokens=10_000, on_progress=lambda *n: reported.append(n)
    )
    np.testing.assert_allclose(scores.rewards, alone[0][order], **TOLERANCE)
    # one sequence, which alone would say all
    assert reported == [(NUM_RESPONSES - 1, NUM_RESPONSES), (NUM_RESPONSES, NUM_RESPONSES)]


@pytest.mark.parametrize("index", [0, 1])
def test_the_progress_of_a_part_rises_and_reaches_its_end_once(model, index):
    """Passes are added up: a pass that ended twice, or never, would run past 100 % or back."""
    reported = []
    run_forward(
        model, GROUPS, max_tokens=30, part=(index, 2), on_progress=lambda *n: reported.append(n)
    )
    done = [number for number, _ in reported]
    assert done == sorted(done) and done.count(NUM_RESPONSES) == 1 and done[-1] == NUM_RESPONSES


def test_a_group_that_is_too_large_for_a_row_is_cut_and_repeats_its_prompt():
    """Prompts of 11, 1, 4, 7, 20 and rows of 24: the second and last pair's branches fit together,
    as does the single one; 11 + 5 + 9 and the three branches behind 4 do not: 4 + 13 + 3, 4 + 6."""
    shared = [item.group for item in share_prompts(GROUPS, 24)]
    tokens = sum(len(g.prompt_ids) + sum(map(len, g.response_ids)) for g in GROUPS)
    assert sum(group.num_tokens for group in shared) == tokens + 11 + 4 + 20
    assert max(group.num_tokens for group in shared) == 24


def test_rows_come_longest_first_and_none_exceeds_its_budget_but_for_a_single_group():
    """Sizes 25, 4, 26, 15, 26 in rows of 30: one of 26 and the 4, one of 26, 25, 15."""
    groups = [TokenizedGroup(g.prompt_ids, tuple(g.response_ids)) for g in GROUPS]
    rows = plan_sequences(groups, max_tokens=30)
    assert rows == [[2, 1], [4], [0], [3]]
    assert plan_sequences(groups, max_tokens=10) == [[2], [4], [0], [3], [1]]


def test_a_score_that_is_no_number_is_an_error_in_every_thread(model):
    broken = tiny_hybrid()
    broken.reward_head.weight.data[0, 0] = float("nan")
    with pytest.raises(NumericsError, match="not finite"):
        run_forward(broken, GROUPS, max_tokens=15, threads=2)


def test_a_row_that_runs_out_of_memory_is_run_in_halves_with_the_same_scores(
    model, alone, monkeypatch, caplog
):
    """26 tokens hold the largest response and its prompt (20 + 4), but few rows as planned."""
    short_of_memory(monkeypatch, 26, training=False)
    with caplog.at_level("WARNING", "hafrm"):
        scores = run_forward(model, GROUPS, max_tokens=10_000)
    assert "running two halves" in caplog.text
    np.testing.assert_allclose(scores.rewards, alone[0], **TOLERANCE)
    np.testing.assert_allclose(scores.logps, alone[1], **TOLERANCE)
    short_of_memory(monkeypatch, 10, training=False)
    with pytest.raises(MemoryBudgetError, match=r"do not fit into memory .* bfloat16"):
        run_forward(model, GROUPS, max_tokens=10_000)


def test_equal_ids_get_equal_scores_wherever_they_lie(model):
    """The same prompt and response twice in a group, and once more in a group of its own."""
    again = [TokenGroup(g.prompt_ids, (*g.response_ids, g.response_ids[0])) for g in GROUPS]
    again += [TokenGroup(g.prompt_ids.copy(), (g.response_ids[0].copy(),)) for g in GROUPS]
    scores = run_forward(model, again, max_tokens=40)
    last = np.cumsum([len(g.response_ids) for g in again]) - 1
    for values in (scores.rewards, scores.logps):
        first = values[scores.first[: len(GROUPS)]]
        assert np.array_equal(first, values[last[: len(GROUPS)]])
        assert np.array_equal(first, values[last[len(GROUPS) :]])
