"""Negative controls: what goes wrong silently in the libraries below us, held so that we notice when
it changes. Each shows the wrong number next to ours."""

import numpy as np
import pytest
import torch
from torch import Tensor

from hafrm.engine.layout import lay_out
from support.models import TokenGroup, stock_classifier, tiny_causal_lm, tiny_hybrid, token_groups

PROMPT, FIRST, SECOND = 9, 6, 5
PAIR = token_groups(((PROMPT, (FIRST, SECOND)),))
FIRST_END, SECOND_END = PROMPT + FIRST - 1, PROMPT + FIRST + SECOND - 1


@torch.no_grad()
def stock_hidden() -> Tensor:
    """Hidden states of the pair's row from the stock model: ids and restarted positions."""
    stock = tiny_causal_lm("llama").base_model
    layout = lay_out(PAIR)
    return stock(
        input_ids=layout.input_ids[None],
        position_ids=layout.position_ids[None],
        use_cache=False,
    ).last_hidden_state[0]


def test_position_ids_alone_make_the_second_branch_blind_to_the_prompt():
    """transformers takes any step of positions other than one for the start of another sequence. The
    first branch is right; the second is scored as if nobody had asked it anything."""
    model = tiny_hybrid("llama")
    with torch.no_grad():
        rewards = model(lay_out(PAIR)).rewards
        hidden = stock_hidden()
        found = model.reward_head(hidden[[FIRST_END, SECOND_END]])[:, 0]
        ids = torch.from_numpy(PAIR[0].response_ids[1]).long()[None]
        alone = tiny_causal_lm("llama").base_model(ids, use_cache=False).last_hidden_state[0, -1]
    torch.testing.assert_close(found[0], rewards[0], atol=1e-5, rtol=1e-5)
    assert (found[1] - rewards[1]).abs() > 0.1
    # Rotary attention knows distances only, so "at position 9 without a prompt" is "alone".
    torch.testing.assert_close(hidden[SECOND_END], alone, atol=1e-4, rtol=1e-4)


PAD, EOS = 0, 2


@pytest.mark.parametrize("pad", [EOS, PAD], ids=["pad is eos", "pad is not eos"])
def test_the_stock_classifier_reads_the_wrong_token_where_pad_is_eos(pad):
    """It takes the rightmost token that is not pad by id: with pad = EOS the token before the EOS that
    the reward was trained on, even in a batch without padding. Ours goes by position."""
    model = tiny_hybrid("llama")
    stock = stock_classifier("llama", model, pad, EOS)
    group = TokenGroup(PAIR[0].prompt_ids, (np.append(PAIR[0].response_ids[0], np.int32(EOS)),))
    layout = lay_out([group])
    with torch.no_grad():
        ours = model(layout).rewards[0]
        found = stock(input_ids=layout.input_ids[None]).logits[0, 0]
        hidden = stock.base_model(layout.input_ids[None], use_cache=False).last_hidden_state[0]
        at_eos, before_eos = model.reward_head(hidden[[-1, -2]])[:, 0]
    torch.testing.assert_close(ours, at_eos, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found, before_eos if pad == EOS else at_eos, atol=1e-5, rtol=1e-5)
    assert (at_eos - before_eos).abs() > 0.1
