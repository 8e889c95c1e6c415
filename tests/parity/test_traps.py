"""Negative controls: what goes wrong silently in the libraries below us, held so that we notice when
it changes. Each shows the wrong number next to ours."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hafrm.engine.layout import lay_out
from hafrm.engine.logprobs import token_logprobs
from support.models import TokenGroup, stock_classifier, tiny_causal_lm, tiny_hybrid, token_groups

PROMPT, FIRST, SECOND = 9, 6, 5
PAIR = token_groups(((PROMPT, (FIRST, SECOND)),))
FIRST_END, SECOND_END = PROMPT + FIRST - 1, PROMPT + FIRST + SECOND - 1


def branch_mask() -> Tensor:
    """True where a token of the pair's row may look, [1, 1, tokens, tokens]."""
    tokens = PROMPT + FIRST + SECOND
    allowed = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    allowed[PROMPT + FIRST :, PROMPT : PROMPT + FIRST] = False
    return allowed[None, None]


@torch.no_grad()
def stock_hidden(attention: str, mask: Tensor | None) -> Tensor:
    """Hidden states of the pair's row from the stock model: ids, restarted positions and a mask."""
    stock = tiny_causal_lm("llama").base_model
    stock.set_attn_implementation(attention)
    layout = lay_out(PAIR)
    return stock(
        input_ids=layout.input_ids[None],
        position_ids=layout.position_ids[None],
        attention_mask=mask,
        use_cache=False,
    ).last_hidden_state[0]


def test_position_ids_alone_make_the_second_branch_blind_to_the_prompt():
    """transformers takes any step of positions other than one for the start of another sequence. The
    first branch is right; the second is scored as if nobody had asked it anything."""
    model = tiny_hybrid("llama")
    with torch.no_grad():
        rewards = model(lay_out(PAIR)).rewards
        hidden = stock_hidden("sdpa", None)
        found = model.reward_head(hidden[[FIRST_END, SECOND_END]])[:, 0]
        ids = torch.from_numpy(PAIR[0].response_ids[1]).long()[None]
        alone = tiny_causal_lm("llama").base_model(ids, use_cache=False).last_hidden_state[0, -1]
    torch.testing.assert_close(found[0], rewards[0], atol=1e-5, rtol=1e-5)
    assert (found[1] - rewards[1]).abs() > 0.1
    # Rotary attention knows distances only, so "at position 9 without a prompt" is "alone".
    torch.testing.assert_close(hidden[SECOND_END], alone, atol=1e-4, rtol=1e-4)


def test_a_boolean_mask_under_eager_attention_is_added_and_not_masked():
    """The same mask is right under sdpa and, as 0 and -inf, under eager. True and False added to the
    scores as 1 and 0 mask nothing, and no error is raised."""
    mask = branch_mask()
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    expected = stock_hidden("sdpa", mask)
    torch.testing.assert_close(stock_hidden("eager", additive), expected, atol=1e-5, rtol=1e-5)
    assert (stock_hidden("eager", mask) - expected).abs().max() > 0.1
    model = tiny_hybrid("llama")
    with torch.no_grad():
        found = model.reward_head(expected[[FIRST_END, SECOND_END]])[:, 0]
        torch.testing.assert_close(found, model(lay_out(PAIR)).rewards, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(
    not hasattr(F, "linear_cross_entropy"), reason="this torch has no linear_cross_entropy"
)
def test_torchs_fused_cross_entropy_puts_out_half_precision_and_ours_does_not():
    """Its per-token losses of about 30 come in steps of 0.125; ours keep a sum of 300 to 0.01."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(300, 64).bfloat16(), torch.randn(500, 64).bfloat16()
    targets = torch.randint(0, 500, (300,))
    theirs = -F.linear_cross_entropy(hidden, weight, targets, reduction="none")
    ours = token_logprobs(hidden, weight, targets)
    exact = (hidden.double() @ weight.double().t()).log_softmax(-1)
    exact = exact.gather(1, targets[:, None])[:, 0]
    assert theirs.dtype == torch.bfloat16
    assert ours.dtype == torch.float32
    assert (theirs.double() - exact).abs().max() > 0.03
    assert (ours.double() - exact).abs().max() < 1e-4
    assert abs(ours.double().sum() - exact.sum()) < 1e-2


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
