"""Hidden states in bulk: what the reward head reads, whatever the row."""

import numpy as np
import pytest
import torch

from hafrm.diagnostics.model_runs import draw_responses, keep_responses, last_states
from hafrm.engine.layout import lay_out, unshare
from hafrm.preferences import TokenizedGroup
from support.models import SHAPES, tiny_hybrid, token_groups

GROUPS = token_groups(SHAPES)


def tokenized(groups):
    return [TokenizedGroup(group.prompt_ids, tuple(group.response_ids)) for group in groups]


TOKENIZED = tokenized(GROUPS)
NUM = sum(len(group.response_ids) for group in GROUPS)


@pytest.fixture(scope="module")
def model():
    return tiny_hybrid().eval()


@pytest.mark.parametrize("sharing", [True, False])
def test_states_are_those_of_a_plain_padded_run_at_the_last_token(model, sharing: bool) -> None:
    """float32, 2e-5: sums in another order."""
    states = last_states(tiny_hybrid(sharing=sharing).eval(), GROUPS)
    padded = unshare(lay_out(GROUPS))
    model.share(False)
    with torch.no_grad():
        plain = model.backbone(input_ids=padded.input_ids, attention_mask=padded.attention_mask)
    model.share(True)
    expected = plain.last_hidden_state.flatten(0, 1)[padded.last].numpy()
    np.testing.assert_allclose(states, expected, atol=2e-5, rtol=1e-5)


def test_responses_are_drawn_once_each_by_the_seed_and_stay_in_order() -> None:
    for num in (1, 4, 99):
        drawn = draw_responses(NUM, num, seed=0)
        assert drawn.sum() == min(num, NUM)
        np.testing.assert_array_equal(drawn, draw_responses(NUM, num, seed=0))
        kept = keep_responses(TOKENIZED, drawn)
        assert 0 not in [len(each.response_ids) for each in kept]
        everything = [ids.tolist() for group in GROUPS for ids in group.response_ids]
        texts = [ids.tolist() for each in kept for ids in each.response_ids]
        assert texts == [everything[i] for i in np.flatnonzero(drawn)]
    assert (draw_responses(NUM, 4, seed=0) != draw_responses(NUM, 4, seed=1)).any()
