"""Log-probs, states and entropies of single response tokens, and a temperature, against plain torch."""

import pytest
import torch

from hafrm.engine.layout import lay_out
from hafrm.engine.logprobs import LogitTransform, token_entropies, token_logprobs
from support.models import SHAPES, tiny_hybrid, token_groups


@pytest.mark.parametrize("sharing", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_token_log_probs_sum_to_the_log_probs_of_their_responses(family: str, sharing: bool):
    model = tiny_hybrid(family, sharing=sharing)
    layout = lay_out(token_groups(SHAPES))
    with torch.no_grad():
        tokens, outputs = model.tokens(layout), model(layout)
    assert tokens.hidden.shape == (len(layout.targets), 32)
    sums = torch.zeros(layout.num_responses).index_add(0, layout.response_of, tokens.logps)
    assert torch.equal(sums, outputs.logps)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("frozen", [True, False])
def test_a_temperature_divides_the_final_logits_and_their_gradient(softcap, frozen):
    """Against autograd through softcap * tanh(scale * z / softcap) / T."""
    torch.manual_seed(0)
    hidden = torch.randn(7, 5, requires_grad=True)
    weight = torch.randn(11, 5, requires_grad=not frozen)
    targets = torch.randint(11, (7,))
    transform = LogitTransform(scale=1.5, softcap=softcap, temperature=0.6)
    found = token_logprobs(hidden, weight, targets, transform=transform, chunk=3)
    z = 1.5 * (hidden @ weight.t())
    z = z if softcap is None else softcap * (z / softcap).tanh()
    expected = (z / 0.6).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(found, expected)
    upstream = torch.randn(7)
    wanted = [hidden] if frozen else [hidden, weight]
    for mine, theirs in zip(
        torch.autograd.grad(found, wanted, upstream),
        torch.autograd.grad(expected, wanted, upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def test_entropies_are_those_of_the_full_distribution_whatever_the_chunk():
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(7, 5), torch.randn(11, 5), torch.randn(11)
    transform = LogitTransform(scale=0.5, softcap=2.0, temperature=0.8)
    z = 2.0 * ((hidden @ weight.t() + bias) * 0.5 / 2.0).tanh() / 0.8
    expected = torch.distributions.Categorical(logits=z).entropy()
    for chunk in (None, 1, 3, 100):
        found = token_entropies(hidden, weight, bias=bias, transform=transform, chunk=chunk)
        torch.testing.assert_close(found, expected)
