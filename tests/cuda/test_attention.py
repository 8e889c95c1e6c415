"""The kernels that a GPU runs attention with, against float32 segments and a CPU, gradients included."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hafrm.engine import attention
from hafrm.engine.attention import Rule, attend_by_group, attend_by_segment, shared_prefix_attention
from hafrm.engine.layout import Layout, lay_out
from support.models import SHAPES, tiny_hybrid, token_groups

pytestmark = pytest.mark.cuda

LONG = ((300, (200, 130)), (1, (129, 1)), (64, (64, 64, 65)))
"""Longer than the kernels' tiles of 64 and 128, at their edges, and across them."""
WINDOWS = [None, 100]
"""The second is shorter than the first prompt, and no multiple of a tile."""


def layout_on(device: torch.device) -> Layout:
    return lay_out(token_groups((*SHAPES, *LONG))).to(device)


def inputs(
    layout: Layout,
    heads: tuple[int, int],
    sizes: tuple[int, int],
    dtype: torch.dtype,
) -> tuple[list[Tensor], list[Tensor]]:
    """Query, key and value in `dtype`, and the same numbers in float32."""
    torch.manual_seed(0)
    shapes = ((heads[0], sizes[0]), (heads[1], sizes[0]), (heads[1], sizes[1]))
    rounded = [
        torch.randn(1, n, layout.num_tokens, size, device=layout.input_ids.device)
        .to(dtype)
        .requires_grad_()
        for n, size in shapes
    ]
    return rounded, [x.detach().float().requires_grad_() for x in rounded]


def assert_equal_in_precision(
    output: Tensor, expected: Tensor, rounded: list[Tensor], exact: list[Tensor]
) -> None:
    """Values and gradients of order 1: bfloat16 has 8 bits (0.4 %), float16 11, and a wrong mask is off by
    0.1 and more on average."""
    unit = 1.0 if output.dtype == torch.bfloat16 else 0.25
    upstream = torch.randn_like(expected).to(output.dtype)
    output.backward(upstream)
    expected.backward(upstream.float())
    torch.testing.assert_close(output.float(), expected, atol=3e-2 * unit, rtol=2e-2 * unit)
    for x, y in zip(rounded, exact, strict=True):
        torch.testing.assert_close(x.grad.float(), y.grad, atol=6e-2 * unit, rtol=3e-2 * unit)
        assert (x.grad.float() - y.grad).abs().mean() < 6e-3 * unit * max(1.0, float(y.grad.std()))


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("heads", [(8, 8), (8, 2)], ids=["as many keys", "grouped"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("size", [64, 80, 128, 256])
def test_half_precision_attention_equals_float32_segments(
    size, dtype, heads, window, device, monkeypatch
):
    """80 is Phi-2's head size, 256 Gemma's. On a GPU this is one call of the varlen kernel, where torch has
    it whole."""
    calls = []

    def watched(*args: Any) -> Tensor:
        calls.append(args)
        return varlen(*args)

    varlen = attention._varlen
    monkeypatch.setattr(attention, "_varlen", watched)
    layout = layout_on(device)
    rounded, exact = inputs(layout, heads, (size, size), dtype)
    output, _ = shared_prefix_attention(
        torch.nn.Module(), *rounded, branch_layout=layout, sliding_window=window
    )
    expected = attend_by_segment(*exact, layout, Rule(window=window))
    assert_equal_in_precision(output, expected, rounded, exact)
    assert len(calls) == (device.type == "cuda" and attention._VARLEN_COMPLETE)


@pytest.mark.parametrize("sizes", [(512, 512), (192, 128), (128, 192), (60, 60)], ids=str)
def test_head_sizes_that_flash_attention_lacks_are_computed_all_the_same(sizes, device):
    """Gemma-4's global layers, DeepSeek's keys wider than values, and what is no multiple of 8."""
    layout = layout_on(device)
    rounded, exact = inputs(layout, (8, 2), sizes, torch.bfloat16)
    output, _ = shared_prefix_attention(
        torch.nn.Module(), *rounded, branch_layout=layout, sliding_window=100
    )
    expected = attend_by_segment(*exact, layout, Rule(window=100))
    assert output.is_contiguous()
    assert_equal_in_precision(output, expected, rounded, exact)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", WINDOWS)
def test_padded_groups_equal_segments_in_float32(window, softcap, device):
    """1e-4: the memory-efficient kernel multiplies in three TF32 products."""
    layout = layout_on(device)
    ours, exact = inputs(layout, (8, 2), (64, 64), torch.float32)
    rule = Rule(window=window, softcap=softcap)
    output, expected = attend_by_group(*ours, layout, rule), attend_by_segment(*exact, layout, rule)
    torch.testing.assert_close(output, expected, atol=1e-4, rtol=1e-4)
    upstream = torch.randn_like(expected)
    output.backward(upstream)
    expected.backward(upstream)
    for x, y in zip(ours, exact, strict=True):
        torch.testing.assert_close(x.grad, y.grad, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("precision", "tolerance"), [(None, 1e-4), (torch.bfloat16, 5e-2)], ids=["fp32", "bf16"]
)
@pytest.mark.parametrize("family", ["llama", "mistral", "phi", "gemma2", "gemma3", "gpt2"])
def test_a_models_gradient_equals_that_of_a_cpu_in_float32(family, precision, tolerance, device):
    """The norm of the difference relative to the gradient's, over all weights together."""

    def gradient(on: torch.device, dtype: torch.dtype | None) -> Tensor:
        model, layout = tiny_hybrid(family).to(on), lay_out(token_groups(SHAPES)).to(on)
        with torch.autocast(on.type, dtype, enabled=dtype is not None):
            outputs = model(layout)
        (outputs.rewards.sum() + 0.1 * outputs.logps.sum()).backward()
        return torch.cat([p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None])

    expected = gradient(torch.device("cpu"), None)
    assert (gradient(device, precision) - expected).norm() < tolerance * expected.norm()
