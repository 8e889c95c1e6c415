"""Shared-prefix attention, registered once with transformers' AttentionInterface.

Every segment (one per response) is a causal attention call, bottom-right aligned: queries
`[prompt + first branch | second branch | ...]`, keys `[prompt + branch]` for each. On CUDA in half
precision this is one varlen call per layer (torch's own, or flash-attn's where scores are soft-capped);
elsewhere `masked_attention` does it. No `[tokens, tokens]` mask is ever built, and no model code is
touched: the layout arrives as a keyword that transformers hands down to the attention function.
"""

import inspect
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from hafrm.engine.layout import Layout
from hafrm.engine.masked_attention import Rule, attend_by_group, attend_by_segment

SHARED_PREFIX = "hafrm_shared_prefix"
"""The name under which transformers knows this attention."""

try:  # CUDA only; private in older releases of torch
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # pragma: no cover - torch before 2.10
    varlen_attn = None  # type: ignore[assignment]

try:  # pragma: no cover - an extra of the user's; the only varlen call with soft-capping
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None

_PARAMETERS = set() if varlen_attn is None else set(inspect.signature(varlen_attn).parameters)
# Releases before 2.11 lack a scale or a window: there flash-attn or padded groups run.
_VARLEN_COMPLETE = {"scale", "window_size"} <= _PARAMETERS


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
    """Attention output of every token over its own prompt and its own branch; no weights.

    Raises ValueError when the caller passed no layout, or for attention sinks, which this does not
    implement (a silent omission would be wrong numbers).
    """
    if branch_layout is None or attention_mask is not None:
        raise ValueError(
            f"{SHARED_PREFIX} needs branch_layout and no mask; call HybridModel instead"
        )
    if unused.get("s_aux") is not None:
        raise ValueError("attention sinks cannot share prefixes; set training.sharing: off")
    # The meta device, on which memory is planned, has no autocast.
    if not query.is_meta and torch.is_autocast_enabled(query.device.type):
        # Rotary factors in float32 have made the query and key so; the kernels want half precision.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    rule = Rule(scaling, sliding_window or getattr(module, "sliding_window", None), softcap)
    return _attend(query, key, value, branch_layout, rule), None


AttentionInterface.register(SHARED_PREFIX, shared_prefix_attention)


# A compiled layer breaks its graph here; else it would be compiled again for each sequence's lengths.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _attend(query: Tensor, key: Tensor, value: Tensor, layout: Layout, rule: Rule) -> Tensor:
    """By the fastest way that computes this rule here."""
    if not query.is_cuda:
        return attend_by_segment(query, key, value, layout, rule)
    if _has_kernel(query, key, value, torch.cuda.get_device_capability(query.device)):
        if _VARLEN_COMPLETE and rule.softcap is None:
            return _varlen(query, key, value, layout, rule)
        if flash_attn_varlen_func is not None:
            return _flash(query, key, value, layout, rule)
    return attend_by_group(query, key, value, layout, rule)


def _has_kernel(query: Tensor, key: Tensor, value: Tensor, capability: tuple[int, int]) -> bool:
    """Whether flash attention, torch's or the package's, runs these head sizes on such a card."""
    return (
        query.dtype in (torch.float16, torch.bfloat16)
        and capability >= (8, 0)
        and value.shape[-1] <= query.shape[-1] == key.shape[-1] <= 256  # narrow values are padded
        and query.shape[-1] % 8 == 0
    )


def _varlen(query: Tensor, key: Tensor, value: Tensor, layout: Layout, rule: Rule) -> Tensor:
    """One call of torch's kernel for all segments."""
    # Releases before 2.12 group heads without being asked to.
    grouped = query.shape[1] != key.shape[1]
    options: dict[str, Any] = {"enable_gqa": grouped} if "enable_gqa" in _PARAMETERS else {}
    output = varlen_attn(
        *_flat_segments(query, key, value, layout),
        scale=rule.scaling,
        window_size=_flash_window(rule),
        **options,
    )
    assert isinstance(output, Tensor)
    return output[None, ..., : value.shape[-1]].contiguous()


def _flash(query: Tensor, key: Tensor, value: Tensor, layout: Layout, rule: Rule) -> Tensor:
    """As _varlen, by the flash-attn package: bottom-right aligned since 2.1, soft-capped since 2.6."""
    output: Tensor = flash_attn_varlen_func(
        *_flat_segments(query, key, value, layout),
        softmax_scale=rule.scaling,
        causal=True,
        window_size=_flash_window(rule),
        softcap=rule.softcap or 0.0,
    )
    return output[None, ..., : value.shape[-1]].contiguous()


def _flash_window(rule: Rule) -> tuple[int, int]:
    # transformers lets a token see `window` keys, itself included; flash attention sees left + 1
    return (-1 if rule.window is None else rule.window - 1, 0)


def _flat_segments(query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> tuple[Any, ...]:
    """The kernels' first seven arguments: [tokens, heads, dim] tensors and the segments' bounds."""
    if value.shape[-1] < key.shape[-1]:
        value = F.pad(value, (0, key.shape[-1] - value.shape[-1]))
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return (
        q.contiguous(),
        k.index_select(0, layout.key_index),  # a prompt's keys once for each of its branches
        v.index_select(0, layout.key_index),
        layout.cu_queries,
        layout.cu_keys,
        max(layout.query_lengths),
        max(layout.key_lengths),
    )
