"""Shared-prefix attention against a full mask written from its definition, token by token."""

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from hafrm.engine import attention
from hafrm.engine.attention import (
    CannotShareError,
    Rule,
    attend_by_group,
    attend_by_segment,
    shared_prefix_attention,
)
from hafrm.engine.layout import Layout, lay_out
from support.dispatched import Dispatched
from support.models import SHAPES, tiny_hybrid, token_groups

MODULE = torch.nn.Module()
HEADS = {"as many keys": (4, 4), "grouped": (4, 2), "one key head": (4, 1)}
WINDOWS = [None, 1, 3, 7, 1000]
"""No window, itself alone, inside a branch, into prompts, larger than every segment."""


def members(layout: Layout) -> list[tuple[int, int | None, int]]:
    """(group, branch or None for the prompt, position) of every row token."""
    found: list[tuple[int, int | None, int]] = []
    for group, (prompt, branches) in enumerate(layout.shape):
        found += [(group, None, position) for position in range(prompt)]
        for branch, length in enumerate(branches):
            found += [(group, branch, prompt + offset) for offset in range(length)]
    return found


def full_mask(layout: Layout, window: int | None = None) -> Tensor:
    """allowed[i, j]: token j is of i's own prompt or own branch, not after it, and in the window."""
    tokens = members(layout)
    rows = [
        [
            group == other
            and key_branch in (None, branch)
            and key_position <= position
            and (window is None or position - key_position < window)
            for other, key_branch, key_position in tokens
        ]
        for group, branch, position in tokens
    ]
    return torch.tensor(rows)


def slow_attention(
    q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scaling: float | None, softcap: float | None
) -> Tensor:
    """softmax(cap * tanh(scores / cap)) under the mask, in float64; [1, tokens, heads, value_dim]."""
    repeat = q.shape[1] // k.shape[1]
    q, k, v = q.double(), *(x.double().repeat_interleave(repeat, dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
    return (weights @ v).transpose(1, 2).float()


def tensors(layout: Layout, heads: tuple[int, int], value_dim: int = 8) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    sizes = ((heads[0], 8), (heads[1], 8), (heads[1], value_dim))
    return tuple(torch.randn(1, h, layout.num_tokens, d, requires_grad=True) for h, d in sizes)


def compare(found: Tensor, expected: Tensor, inputs: tuple[Tensor, ...]) -> None:
    """Outputs, and the inputs' gradients under one random upstream gradient, to 1e-5: float32 sums
    of a few dozen terms of order 1."""
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    upstream = torch.randn_like(expected)
    grads = torch.autograd.grad(found, inputs, upstream)
    slow_grads = torch.autograd.grad(expected, inputs, upstream)
    for grad, slow in zip(grads, slow_grads, strict=True):
        torch.testing.assert_close(grad, slow, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("softcap", "scaling"), [(None, None), (2.0, None), (None, 0.05), (2.0, 1.0)]
)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_segments_attend_as_the_full_mask_says(heads, window, softcap, scaling):
    """Values may be narrower than keys. Contiguous, as transformers' own: AFMoE `view`s the output."""
    layout = lay_out(token_groups(SHAPES))
    q, k, v = tensors(layout, heads, value_dim=6)
    options = {"sliding_window": window, "softcap": softcap, "scaling": scaling}
    found, weights = shared_prefix_attention(MODULE, q, k, v, branch_layout=layout, **options)
    assert weights is None and found.is_contiguous()
    compare(found, slow_attention(q, k, v, full_mask(layout, window), scaling, softcap), (q, k, v))


def test_a_window_that_only_the_module_knows_is_used():
    """Some models hand the window over as an argument, others keep it on the attention module."""
    layout = lay_out(token_groups(SHAPES))
    q, k, v = tensors(layout, (4, 2))
    windowed = torch.nn.Module()
    windowed.sliding_window = 4
    found, _ = shared_prefix_attention(windowed, q, k, v, branch_layout=layout)
    compare(found, slow_attention(q, k, v, full_mask(layout, 4), None, None), (q, k, v))


def test_a_layout_serves_layers_with_and_without_a_window():
    """Masks are cached on the layout: one of another window, or of none, must not be taken."""
    layout = lay_out(token_groups(SHAPES))
    q, k, v = tensors(layout, (2, 2))
    for window in (3, None, 5, 3):
        found, _ = shared_prefix_attention(
            MODULE, q, k, v, branch_layout=layout, sliding_window=window
        )
        compare(found, slow_attention(q, k, v, full_mask(layout, window), None, None), (q, k, v))


MANY = tuple((9, (5, 7)) for _ in range(16))
"""336 tokens in 32 segments of at most 16 keys: far fewer elements per segment than tokens^2."""


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 4])
def test_nothing_of_tokens_by_tokens_is_built_forward_or_backward(window, softcap):
    """The largest tensors are the row's queries, keys and outputs: 4 heads * 336 * 8 elements."""
    layout = lay_out(token_groups(MANY))
    q, k, v = tensors(layout, (4, 4))
    with Dispatched() as largest:
        found, _ = shared_prefix_attention(
            MODULE, q, k, v, branch_layout=layout, sliding_window=window, softcap=softcap
        )
        found.sum().backward()
    assert layout.num_tokens == 336
    assert largest.numel == q.numel() < layout.num_tokens**2
    assert all(mask.shape[0] <= 16 and mask.shape[1] <= 16 for mask in layout.masks.values())


def test_under_autocast_the_query_is_in_half_precision_when_the_backend_is_chosen(monkeypatch):
    """Half precision is what the varlen kernel asks for; a float32 query takes the slow loop. Under
    autocast with float32 weights the projections are bfloat16, the rotary factors float32, and so is
    their product."""
    model, seen = tiny_hybrid("llama"), []

    def watched(query: Tensor, *rest: Any) -> Tensor:
        seen.append(query.dtype)
        return attend_by_segment(query, *rest)

    monkeypatch.setattr(attention, "_attend", watched)
    with torch.autocast("cpu", torch.bfloat16):
        model(lay_out(token_groups(SHAPES)))
    assert seen == [torch.bfloat16] * 2


def test_a_call_without_a_layout_with_a_mask_or_with_attention_sinks_is_refused():
    layout = lay_out(token_groups(SHAPES))
    inputs = tensors(layout, (4, 2))
    with pytest.raises(CannotShareError, match=r"no layout.*training\.sharing: off"):
        shared_prefix_attention(MODULE, *inputs)
    with pytest.raises(CannotShareError, match="a mask of their own"):
        shared_prefix_attention(MODULE, *inputs, torch.ones(1, 1, 2, 2), branch_layout=layout)
    with pytest.raises(CannotShareError, match=r"sinks.*training\.sharing: off"):
        shared_prefix_attention(MODULE, *inputs, branch_layout=layout, s_aux=torch.zeros(4))


def slow_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """What flash attention's varlen call does, a segment at a time: query i of n over m keys sees
    key j where  i + m - n - left <= j <= i + m - n + right  (bottom-right aligned), -1 = no bound."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert query.is_contiguous()
    assert query.shape[-1] == key.shape[-1] == value.shape[-1]  # or the kernel refuses
    assert enable_gqa == (query.shape[1] != key.shape[1])
    lengths = [bounds.diff().tolist() for bounds in (cu_seq_q, cu_seq_k)]
    assert (max_q, max_k) == (max(lengths[0]), max(lengths[1]))
    assert [sum(n) for n in lengths] == [len(query), len(key)]
    left, right = window_size
    outputs = []
    segments = zip(
        query.split(lengths[0]), key.split(lengths[1]), value.split(lengths[1]), strict=True
    )
    for segment in segments:
        q, k, v = (x.transpose(0, 1)[None] for x in segment)
        last = torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2]
        keys = torch.arange(k.shape[2])[None, :]
        allowed = (keys <= last + right) if right >= 0 else torch.ones_like(keys <= last)
        if left >= 0:
            allowed &= keys >= last - left
        outputs.append(slow_attention(q, k, v, allowed, scale, None)[0])
    return torch.cat(outputs)


@pytest.fixture
def varlen_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[inspect.BoundArguments]]:
    """Send the shared path through `slow_varlen`, and every call through the real one's signature."""
    signature = inspect.signature(attention.varlen_attn)
    calls: list[inspect.BoundArguments] = []

    def call(*args: Any, **options: Any) -> Tensor:
        calls.append(signature.bind(*args, **options))
        return slow_varlen(*args, **options)

    monkeypatch.setattr(attention, "varlen_attn", call)
    monkeypatch.setattr(attention, "_attend", attention._varlen)
    return calls


@pytest.mark.skipif(attention.varlen_attn is None, reason="this torch has no varlen_attn")
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_the_varlen_call_equals_the_segments(heads, window, varlen_calls):
    """Values narrower than keys, as in multi-head latent attention, are padded and cut again."""
    layout = lay_out(token_groups(SHAPES))
    q, k, v = tensors(layout, heads, value_dim=6)
    found, _ = shared_prefix_attention(
        MODULE, q, k, v, branch_layout=layout, sliding_window=window, scaling=0.2
    )
    assert found.is_contiguous()
    segments = attend_by_segment(q, k, v, layout, Rule(scaling=0.2, window=window))
    compare(found, segments, (q, k, v))
    assert len(varlen_calls) == 1


def test_a_torch_without_grouped_heads_as_an_option_groups_them_by_itself(monkeypatch):
    """2.11 has a scale and a window, and its kernel takes fewer key heads without being asked to."""

    def varlen_of_2_11(
        query: Tensor, key: Tensor, *rest: Any, scale: float, window_size: tuple[int, int]
    ) -> Tensor:
        grouped = query.shape[1] != key.shape[1]
        return slow_varlen(
            query, key, *rest, scale=scale, window_size=window_size, enable_gqa=grouped
        )

    monkeypatch.setattr(attention, "varlen_attn", varlen_of_2_11)
    monkeypatch.setattr(attention, "_PARAMETERS", {"scale", "window_size"})
    layout, rule = lay_out(token_groups(SHAPES)), Rule(scaling=0.2, window=5)
    q, k, v = tensors(layout, (4, 2))
    found = attention._varlen(q, k, v, layout, rule)
    compare(found, attend_by_segment(q, k, v, layout, rule), (q, k, v))


AMPERE, TURING = (8, 6), (7, 5)


@pytest.mark.parametrize(
    ("size", "value_size", "dtype", "card", "expected"),
    [
        (80, 80, torch.bfloat16, AMPERE, True),  # Phi-2
        (256, 256, torch.float16, AMPERE, True),  # Gemma
        (192, 128, torch.bfloat16, AMPERE, True),  # DeepSeek-V3, padded
        (512, 512, torch.bfloat16, AMPERE, False),  # Gemma-4's global layers
        (128, 192, torch.bfloat16, AMPERE, False),
        (60, 60, torch.bfloat16, AMPERE, False),
        (64, 64, torch.float32, AMPERE, False),
        (64, 64, torch.float16, TURING, False),
    ],
)
def test_what_flash_attention_cannot_run_is_left_to_padded_groups(
    size, value_size, dtype, card, expected
):
    key, value = (torch.empty(1, 2, 3, n, dtype=dtype) for n in (size, value_size))
    assert attention._has_kernel(key, key, value, card) == expected


@pytest.mark.skipif(attention.varlen_attn is None, reason="this torch has no varlen_attn")
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma3"])
def test_a_model_makes_one_varlen_call_per_layer_and_gives_the_same_numbers(family, varlen_calls):
    model, layout = tiny_hybrid(family), lay_out(token_groups(SHAPES))
    varlen_calls.clear()  # those of the trial that every new model makes
    through_varlen = model(layout)
    assert len(varlen_calls) == model.backbone.config.num_hidden_layers == 2
    model.share(False)
    plain = model(layout)
    torch.testing.assert_close(through_varlen.rewards, plain.rewards, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(through_varlen.logps, plain.logps, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_padded_groups_attend_as_the_full_mask_says(heads, window, softcap):
    layout = lay_out(token_groups(SHAPES))
    q, k, v = tensors(layout, heads)
    found = attend_by_group(q, k, v, layout, Rule(scaling=0.2, window=window, softcap=softcap))
    compare(found, slow_attention(q, k, v, full_mask(layout, window), 0.2, softcap), (q, k, v))
