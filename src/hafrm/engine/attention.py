"""Shared-prefix attention, registered once with transformers' AttentionInterface.

Every segment (one per response) is an ordinary causal attention call, bottom-right aligned: queries
`[prompt + first branch | second branch | ...]`, keys `[prompt + branch]` for each. On CUDA in half
precision this is one varlen call per layer; elsewhere a loop of scaled_dot_product_attention, which is
also the reference. No `[tokens, tokens]` mask is ever built, and no model code is touched: the layout
arrives as a keyword argument that transformers hands down to the attention function.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from hafrm.engine.layout import Layout

SHARED_PREFIX = "hafrm_shared_prefix"
"""The name under which transformers knows this attention."""

try:  # CUDA only; private in older releases of torch
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # pragma: no cover - torch before 2.10
    varlen_attn = None  # type: ignore[assignment]

# Releases before 2.12 lack grouped heads, a scale or a window: there the segments run, slower and right.
_VARLEN_COMPLETE = varlen_attn is not None and {"scale", "window_size", "enable_gqa"} <= set(
    inspect.signature(varlen_attn).parameters
)


def shared_prefix_attention(  # noqa: PLR0913 - the signature is transformers'
    module: nn.Module,
    query: Float[Tensor, "1 heads tokens dim"],
    key: Float[Tensor, "1 kv_heads tokens dim"],
    value: Float[Tensor, "1 kv_heads tokens value_dim"],
    attention_mask: Tensor | None = None,
    *,
    scaling: float | None = None,
    branch_layout: Layout | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **unused: Any,
) -> tuple[Float[Tensor, "1 tokens heads value_dim"], None]:
    """Attention output of every row over its own prompt and its own branch; no weights.

    Raises ValueError when the caller passed no layout, or for attention sinks, which this does not
    implement (a silent omission would be wrong numbers).
    """
    if branch_layout is None or attention_mask is not None:
        raise ValueError(
            f"{SHARED_PREFIX} needs branch_layout and no mask; call HybridModel instead"
        )
    if unused.get("s_aux") is not None:
        raise ValueError("attention sinks cannot share prefixes; set training.sharing: off")
    if torch.is_autocast_enabled(query.device.type):
        # Rotary factors in float32 have made the query and key so; the kernels want half precision.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    window = sliding_window or getattr(module, "sliding_window", None)
    if _varlen_fits(query, softcap):
        output = _varlen(query, key, value, branch_layout, scaling, window)
    else:
        output = _segments(query, key, value, branch_layout, scaling, window, softcap)
    return output, None


AttentionInterface.register(SHARED_PREFIX, shared_prefix_attention)


def _varlen_fits(query: Tensor, softcap: float | None) -> bool:
    half = query.dtype in (torch.float16, torch.bfloat16)
    return _VARLEN_COMPLETE and query.is_cuda and half and softcap is None


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """One call for all segments. `(window - 1, 0)`: transformers lets a token see `window` keys,
    itself included, flash attention `left + 1`."""
    keys = key[0].transpose(0, 1)[layout.key_index]
    values = value[0].transpose(0, 1)[layout.key_index]
    output = varlen_attn(
        query[0].transpose(0, 1).contiguous(),
        keys,
        values,
        layout.cu_queries,
        layout.cu_keys,
        max(layout.query_lengths),
        max(layout.key_lengths),
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output, Tensor)
    return output[None]


def _segments(  # noqa: PLR0913
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """The reference: one attention call per segment.

    `split` and not slicing: its backward is one concatenation, where every slice would allocate a
    gradient of the whole row.
    """
    attend = _plain if softcap is None else _capped(softcap)
    lengths = layout.query_lengths
    queries, keys, values = (torch.split(x, lengths, dim=2) for x in (query, key, value))
    outputs = []
    segment = 0
    for prompt, branches in layout.shape:
        prompt_key, prompt_value = (x[segment][:, :, :prompt] for x in (keys, values))
        for branch in range(len(branches)):
            k, v = keys[segment], values[segment]
            if branch:
                k, v = torch.cat([prompt_key, k], dim=2), torch.cat([prompt_value, v], dim=2)
            mask = _mask(layout, queries[segment].shape[2], k.shape[2], window)
            outputs.append(attend(queries[segment], k, v, mask, scaling))
            segment += 1
    return torch.cat([output.transpose(1, 2) for output in outputs], dim=1)


def _mask(layout: Layout, queries: int, keys: int, window: int | None) -> Tensor | None:
    """Causal, bottom-right aligned, windowed; None where `is_causal` says the same for free."""
    if window is not None and window >= keys:
        window = None
    if queries == keys and window is None:
        return None
    name = (queries, keys, window)
    if name not in layout.masks:
        allowed = torch.ones(queries, keys, dtype=torch.bool, device=layout.input_ids.device)
        allowed = allowed.tril(keys - queries)
        if window is not None:
            allowed = allowed.triu(keys - queries - window + 1)
        layout.masks[name] = allowed
    return layout.masks[name]


def _plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped
    )


def _capped(softcap: float) -> Callable[..., Tensor]:
    """Attention with soft-capped scores (Gemma-2), which no fused kernel of torch offers."""

    def attend(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float | None
    ) -> Tensor:
        repeat = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
        scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
        scores = softcap * torch.tanh(scores / softcap)
        if mask is None:
            mask = torch.ones_like(scores[0, 0], dtype=torch.bool).tril()
        scores = scores.masked_fill(~mask, float("-inf"))
        return torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v

    return attend
