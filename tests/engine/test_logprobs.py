"""Chunked log-probs against log_softmax and gather, in values, gradients, precision and memory."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hafrm.engine import logprobs
from hafrm.engine.layout import lay_out
from hafrm.engine.logprobs import LogitTransform, token_entropies, token_logprobs
from support.dispatched import Dispatched
from support.models import SHAPES, tiny_hybrid, token_groups

SCORED, HIDDEN, VOCAB = 13, 8, 31
CHUNKS = [1, 7, SCORED, SCORED + 5]
TRANSFORMS = {
    "plain": LogitTransform(),
    "softcap": LogitTransform(softcap=3.0),
    "scale": LogitTransform(scale=0.25),
    "all": LogitTransform(scale=2.0, softcap=4.0, temperature=0.6),
    "raw": LogitTransform(scale=2.0, softcap=4.0, temperature=0.6, normalised=False),
}


def slow_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, transform: LogitTransform
) -> Tensor:
    """The definition, in float64, with all logits at once."""
    logits = F.linear(hidden.double(), weight.double(), None if bias is None else bias.double())
    logits = logits * transform.scale
    if transform.softcap is not None:
        logits = transform.softcap * torch.tanh(logits / transform.softcap)
    logits = logits / transform.temperature
    values = logits.log_softmax(-1) if transform.normalised else logits
    return values.gather(1, targets[:, None])[:, 0]


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, bias and targets; logits of order 3, so that a softcap bites."""
    torch.manual_seed(0)
    shapes = ((SCORED, HIDDEN), (VOCAB, HIDDEN), (VOCAB,))
    leaves = [torch.randn(*shape).to(dtype).requires_grad_() for shape in shapes]
    return *leaves, torch.randint(0, VOCAB, (SCORED,))


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("head", ["no bias", "bias", "frozen"])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_log_probs_and_gradients_equal_log_softmax_and_gather(chunk, head, transform):
    """Under a different random upstream gradient for every token, as a policy loss gives; 1e-5 for
    float32 sums of 31 terms of order 1 to 10."""
    hidden, weight, bias, targets = inputs()
    used = None if head == "no bias" else bias
    leaves = (hidden, weight) if used is None else (hidden, weight, bias)
    if head == "frozen":
        weight.requires_grad_(requires_grad=False)
        bias.requires_grad_(requires_grad=False)
        leaves = (hidden,)
    found = token_logprobs(hidden, weight, targets, bias=used, transform=transform, chunk=chunk)
    expected = slow_logprobs(hidden, weight, targets, used, transform)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected.float(), atol=1e-5, rtol=1e-5)
    upstream = torch.randn(SCORED)
    grads = torch.autograd.grad(found, leaves, upstream)
    slow_grads = torch.autograd.grad(expected, leaves, upstream.double())
    for grad, slow in zip(grads, slow_grads, strict=True):
        torch.testing.assert_close(grad, slow, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "needed", ["hidden", "weight", "bias", "weight and bias", "hidden and bias"]
)
def test_only_the_gradients_that_are_needed_are_made_and_they_are_right(needed):
    hidden, weight, bias, targets = inputs()
    leaves = {"hidden": hidden, "weight": weight, "bias": bias}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name in needed)
    wanted = [leaf for name, leaf in leaves.items() if name in needed]
    upstream = torch.randn(SCORED)
    found = token_logprobs(hidden, weight, targets, bias=bias, chunk=5)
    grads = torch.autograd.grad(found, wanted, upstream)
    slow = slow_logprobs(hidden, weight, targets, bias, LogitTransform())
    for grad, expected in zip(
        grads, torch.autograd.grad(slow, wanted, upstream.double()), strict=True
    ):
        torch.testing.assert_close(grad, expected, atol=2e-5, rtol=1e-5)


def test_a_frozen_head_is_never_recomputed_in_backward():
    """Four chunks of 4: two products each (logits, their gradient) in forward and none in backward;
    a trained head makes one in forward and three (logits, hidden, weight) in backward."""
    hidden, weight, _, targets = inputs()
    for head, forward_products, backward_products in ((weight.detach(), 8, 0), (weight, 4, 12)):
        with Dispatched() as forward:
            found = token_logprobs(hidden, head, targets, chunk=4)
        with Dispatched() as backward:
            found.sum().backward()
        assert (forward.products, backward.products) == (forward_products, backward_products)


def test_a_tied_weight_gets_the_gradients_of_both_its_uses():
    """As embedding and as head: hidden states are looked up in the weight itself."""
    _, weight, _, targets = inputs()
    ids = torch.randint(0, VOCAB, (SCORED,))
    upstream = torch.randn(SCORED)
    found = token_logprobs(F.embedding(ids, weight), weight, targets, chunk=5)
    (grad,) = torch.autograd.grad(found, weight, upstream)
    slow = slow_logprobs(F.embedding(ids, weight), weight, targets, None, LogitTransform())
    (expected,) = torch.autograd.grad(slow, weight, upstream.double())
    torch.testing.assert_close(grad, expected, atol=3e-5, rtol=1e-5)


def long_response(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """300 tokens over 500 words; logits of order 8, log-probs around -30."""
    torch.manual_seed(0)
    hidden = torch.randn(300, 64).to(dtype).requires_grad_()
    weight = torch.randn(500, 64).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, 500, (300,))


def test_half_precision_costs_less_than_a_hundredth_of_a_nat_over_300_tokens():
    """Against float64 on the same rounded inputs. The outputs would lose 0.4 nat in bfloat16, whose
    step at 30 is 0.125 (checked here, so that the bound is known to bite). Gradients are half, to 1 %."""
    hidden, weight, targets = long_response(torch.bfloat16)
    upstream = torch.randn(300)
    ours = token_logprobs(hidden, weight, targets, chunk=64)
    expected = slow_logprobs(hidden, weight, targets, None, LogitTransform())
    assert ours.dtype == torch.float32
    assert abs(ours.double().sum() - expected.sum()) < 1e-2
    assert abs(ours.bfloat16().double().sum() - expected.sum()) > 1e-2
    grads = torch.autograd.grad(ours, (hidden, weight), upstream)
    exact_grads = torch.autograd.grad(expected, (hidden, weight), upstream.double())
    for grad, exact in zip(grads, exact_grads, strict=True):
        assert grad.dtype == torch.bfloat16
        assert (grad.float() - exact).norm() < 1e-2 * exact.norm()


def test_autocast_changes_neither_the_dtype_nor_the_precision_of_log_probs():
    hidden, weight, targets = long_response(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = token_logprobs(hidden, weight, targets, chunk=64)
        found.sum().backward()
    expected = slow_logprobs(hidden, weight, targets, None, LogitTransform())
    assert found.dtype == hidden.grad.dtype == weight.grad.dtype == torch.float32
    assert abs(found.double().sum() - expected.sum()) < 1e-2
    (grad,) = torch.autograd.grad(expected.sum(), hidden)
    torch.testing.assert_close(hidden.grad, grad, atol=1e-4, rtol=1e-4)


def test_hidden_states_and_head_may_have_different_dtypes():
    """A bfloat16 backbone under a float32 head, and a float32 norm over a bfloat16 head."""
    hidden, weight, targets = long_response(torch.float32)
    expected = slow_logprobs(hidden, weight, targets, None, LogitTransform())
    for h, w in ((hidden.bfloat16(), weight), (hidden, weight.bfloat16())):
        found = token_logprobs(h, w, targets)
        assert found.dtype == torch.float32
        assert abs(found.double() - expected).mean() < 0.1
        found.sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32


def test_backward_recomputes_in_the_dtype_of_forward_though_autocast_has_ended(monkeypatch):
    """Backward runs outside autocast. Were the logits recomputed in another precision, they would not
    belong to the saved normaliser. CPU never multiplies in half precision, so the choice is stubbed."""
    dtypes = []

    def choose(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else torch.float32
        return hidden.to(dtype), weight.to(dtype)

    def multiply(a: Tensor, b: Tensor) -> Tensor:
        dtypes.append(a.dtype)
        with torch.autocast("cpu", enabled=False):
            return a.float() @ b.float()

    monkeypatch.setattr(logprobs, "_operands", choose)
    monkeypatch.setattr(logprobs, "_matmul", multiply)
    hidden, weight, _, targets = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        found = token_logprobs(hidden, weight, targets)
    found.sum().backward()
    assert dtypes == [torch.bfloat16] * 4


@pytest.mark.cuda
def test_autocast_on_a_gpu_keeps_log_probs_in_float32(device):
    """bfloat16 products accumulated in float32: only the rounding of the inputs is left."""
    hidden, weight, targets = (x.detach().to(device) for x in long_response(torch.float32))
    hidden.requires_grad_()
    weight.requires_grad_()
    with torch.autocast(device.type, torch.bfloat16):
        found = token_logprobs(hidden, weight, targets, chunk=64)
    found.sum().backward()
    rounded = [x.detach().bfloat16().requires_grad_() for x in (hidden, weight)]
    expected = slow_logprobs(*rounded, targets, None, LogitTransform())
    expected.sum().backward()
    assert found.dtype == torch.float32
    assert abs(found.double().sum() - expected.sum()) < 1e-2
    for leaf, exact in zip((hidden, weight), rounded, strict=True):
        assert (leaf.grad - exact.grad.float()).norm() < 2e-2 * exact.grad.float().norm()


WIDE = {"scored": 200, "hidden": 8, "vocab": 512}
"""A chunk of 16 rows has 8192 logits: more than weight (4096) or hidden states (1600), and far less
than the 102400 logits of all rows."""


def wide() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(WIDE["scored"], WIDE["hidden"], requires_grad=True)
    weight = torch.randn(WIDE["vocab"], WIDE["hidden"], requires_grad=True)
    return hidden, weight, torch.randint(0, WIDE["vocab"], (WIDE["scored"],))


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_no_tensor_of_the_head_ever_holds_more_than_a_chunk_of_logits(frozen, softcap):
    hidden, weight, targets = wide()
    weight.requires_grad_(not frozen)
    with Dispatched() as products:
        found = token_logprobs(
            hidden, weight, targets, transform=LogitTransform(softcap=softcap), chunk=16
        )
        found.backward(torch.randn(WIDE["scored"]))
    assert products.numel == 16 * WIDE["vocab"]


def test_the_default_chunk_follows_from_the_vocabulary_and_the_device(monkeypatch):
    """Qwen2.5's 151,936 tokens: 110 rows in 64 MiB of float32 on a CPU, 883 in 512 on a GPU."""
    assert [logprobs.chunk_rows(151_936, device) for device in ("cpu", "cuda")] == [110, 883]
    hidden, weight, targets = wide()
    monkeypatch.setitem(logprobs._CHUNK_ELEMENTS, "cpu", 20 * WIDE["vocab"] + 7)
    with Dispatched() as products:
        token_logprobs(hidden, weight, targets).sum().backward()
    assert products.numel == 20 * WIDE["vocab"]


def test_logits_that_overflow_a_naive_exponential_are_no_problem():
    """exp(200) is infinite in float32; log-probs of 0 and -200 are not."""
    hidden = torch.tensor([[200.0], [200.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [0.0]], requires_grad=True)
    found = token_logprobs(hidden, weight, torch.tensor([0, 1]))
    assert found.tolist() == [0.0, -200.0]
    found.sum().backward()
    assert torch.isfinite(hidden.grad).all()
    assert torch.isfinite(weight.grad).all()


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


def test_entropies_are_those_of_the_full_distribution_whatever_the_chunk():
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(7, 5), torch.randn(11, 5), torch.randn(11)
    transform = LogitTransform(scale=0.5, softcap=2.0, temperature=0.8)
    z = 2.0 * ((hidden @ weight.t() + bias) * 0.5 / 2.0).tanh() / 0.8
    expected = torch.distributions.Categorical(logits=z).entropy()
    for chunk in (None, 1, 3, 100):
        found = token_entropies(hidden, weight, bias=bias, transform=transform, chunk=chunk)
        torch.testing.assert_close(found, expected)
