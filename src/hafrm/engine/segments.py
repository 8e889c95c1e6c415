"""Shared-prefix attention one segment at a time: the reference, and the way on a CPU.

Every segment is an ordinary causal call of scaled_dot_product_attention, bottom-right aligned. No matrix
larger than queries x keys of one segment exists, and where prompt and first branch run together not even
that.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from hafrm.engine.layout import Layout


@dataclass(frozen=True)
class Rule:
    """How scores are made of queries and keys, the same for every row of a layer."""

    scaling: float | None = None
    """Factor of the products; None: 1 / sqrt(dim)."""
    window: int | None = None
    """Keys that a token sees, itself included; None: all before it."""
    softcap: float | None = None
    """Scores are capped to softcap * tanh(score / softcap) (Gemma-2)."""


def attend_by_segment(
    query: Float[Tensor, "1 heads tokens dim"],
    key: Float[Tensor, "1 kv_heads tokens dim"],
    value: Float[Tensor, "1 kv_heads tokens value_dim"],
    layout: Layout,
    rule: Rule,
) -> Float[Tensor, "1 tokens heads value_dim"]:
    """Attention output of every row over its own prompt and its own branch.

    `split` and not slicing: its backward is one concatenation, where every slice would allocate a
    gradient of the whole row.
    """
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
            mask = _mask(layout, queries[segment].shape[2], k.shape[2], rule.window)
            outputs.append(attend(queries[segment], k, v, mask, rule))
            segment += 1
    return torch.cat([output.transpose(1, 2) for output in outputs], dim=1)


def attend(
    q: Float[Tensor, "batch heads queries dim"],
    k: Float[Tensor, "batch kv_heads keys dim"],
    v: Float[Tensor, "batch kv_heads keys value_dim"],
    mask: Bool[Tensor, "... queries keys"] | Float[Tensor, "... queries keys"] | None,
    rule: Rule,
) -> Float[Tensor, "batch heads queries value_dim"]:
    """One dense call under `mask`, which holds window and causality, as booleans or as terms of scores that
    are not capped; None: causal and square."""
    if rule.softcap is not None:
        return _capped(q, k, v, mask, rule)
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=mask is None,
        scale=rule.scaling,
        enable_gqa=q.shape[1] != k.shape[1],
    )


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
    found: Tensor = layout.masks[name]
    return found


def _capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rule: Rule) -> Tensor:
    """Soft-capped scores, which no fused kernel of torch offers."""
    assert rule.softcap is not None
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
    scaling = q.shape[-1] ** -0.5 if rule.scaling is None else rule.scaling
    scores = rule.softcap * torch.tanh(q @ k.transpose(2, 3) * scaling / rule.softcap)
    if mask is None:
        mask = torch.ones_like(scores[0, 0], dtype=torch.bool).tril()
    scores = scores.masked_fill(~mask, float("-inf"))
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v
