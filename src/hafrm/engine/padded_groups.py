"""Shared-prefix attention with a few masked calls per layer: the fallback on CUDA.

A GPU runs a few large calls far faster than a call per segment. Groups of like length (up to the next
power of two) are padded into one batch and attend under a mask of their own, so memory is at most four
times the sum of the groups' squares, never the square of the row.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hafrm.engine.layout import Layout
from hafrm.engine.segments import Rule, attend


@dataclass(frozen=True)
class _Batch:
    """Groups of like length, side by side."""

    rows: Int[Tensor, "groups longest"]
    """Row of each token; padding repeats the group's first row, and nobody attends to it."""
    real: Bool[Tensor, "groups longest"]
    positions: Int[Tensor, "groups longest"]
    branches: Int[Tensor, "groups longest"]
    """-1 for the prompt."""


def attend_by_group(
    query: Float[Tensor, "1 heads tokens dim"],
    key: Float[Tensor, "1 kv_heads tokens dim"],
    value: Float[Tensor, "1 kv_heads tokens value_dim"],
    layout: Layout,
    rule: Rule,
) -> Float[Tensor, "1 tokens heads value_dim"]:
    """Attention output of every row over its own prompt and its own branch."""
    outputs, places = [], []
    for number, batch in enumerate(_batches(layout)):
        rows = batch.rows.flatten()
        heads = query.shape[1]
        q, k, v = (_gathered(x, rows, len(batch.rows), heads) for x in (query, key, value))
        output = attend(q, k, v, _mask(layout, number, batch, rule, query.dtype), rule)
        outputs.append(output.transpose(1, 2).flatten(0, 1)[_real_places(layout, number, batch)])
        places.append(rows[_real_places(layout, number, batch)])
    back = torch.empty_like(torch.cat(places))
    back[torch.cat(places)] = torch.arange(len(back), device=back.device)
    return torch.cat(outputs)[back][None]


def _gathered(x: Tensor, rows: Tensor, groups: int, heads: int) -> Tensor:
    """[1, kv_heads, tokens, dim] -> [groups, heads, longest, dim]: under a mask, fused kernels want keys
    for every query head."""
    picked = x[0].transpose(0, 1).index_select(0, rows)[:, :, None]
    every = picked.expand(-1, -1, heads // x.shape[1], -1).flatten(1, 2)
    return every.view(groups, -1, *every.shape[1:]).transpose(1, 2)


def _batches(layout: Layout) -> list[_Batch]:
    """The layout's groups by length, built once for all layers."""
    if "batches" not in layout.masks:
        sizes = [prompt + sum(branches) for prompt, branches in layout.shape]
        classes: dict[int, list[int]] = {}
        for group, size in enumerate(sizes):
            classes.setdefault((size - 1).bit_length(), []).append(group)
        starts = np.cumsum([0, *sizes])
        layout.masks["batches"] = [_batch(layout, members, starts) for members in classes.values()]
    found: list[_Batch] = layout.masks["batches"]
    return found


def _batch(layout: Layout, members: list[int], starts: np.ndarray) -> _Batch:
    longest = max(int(starts[g + 1] - starts[g]) for g in members)
    longest = -(-longest // 8) * 8  # or the kernel copies the mask, in every layer
    positions = np.zeros((len(members), longest), np.int64)
    branches = np.full((len(members), longest), -1, np.int64)
    rows = np.repeat(starts[members][:, None], longest, axis=1)
    real = np.zeros((len(members), longest), bool)
    for i, group in enumerate(members):
        prompt, lengths = layout.shape[group]
        size = prompt + sum(lengths)
        rows[i, :size] += np.arange(size)
        real[i, :size] = True
        positions[i, :prompt] = np.arange(prompt)
        place = prompt
        for branch, length in enumerate(lengths):
            positions[i, place : place + length] = prompt + np.arange(length)
            branches[i, place : place + length] = branch
            place += length
    device = layout.input_ids.device
    return _Batch(*(torch.from_numpy(x).to(device) for x in (rows, real, positions, branches)))


def _mask(layout: Layout, number: int, batch: _Batch, rule: Rule, dtype: torch.dtype) -> Tensor:
    """What may be attended to, or the same as a term of the scores: of a boolean mask, torch would make and
    keep one in every layer."""
    allowed = _allowed(layout, number, batch, rule.window)
    if rule.softcap is not None:
        return allowed
    name = ("term", number, rule.window, dtype)
    if name not in layout.masks:
        term = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
        layout.masks[name] = term.masked_fill_(~allowed, float("-inf"))
    cached: Tensor = layout.masks[name]
    return cached


def _allowed(layout: Layout, number: int, batch: _Batch, window: int | None) -> Tensor:
    """[groups, 1, queries, keys]: own prompt or own branch, not later, in the window, real; padding sees
    itself, because a row that sees nothing is not a number."""
    name = ("allowed", number, window)
    if name not in layout.masks:
        apart = batch.positions[:, :, None] - batch.positions[:, None, :]
        own = batch.branches[:, :, None] == batch.branches[:, None, :]
        allowed = (own | (batch.branches[:, None, :] == -1)) & (apart >= 0)
        if window is not None:
            allowed &= apart < window
        allowed &= batch.real[:, None, :] & batch.real[:, :, None]
        allowed |= torch.eye(allowed.shape[1], dtype=torch.bool, device=allowed.device)
        layout.masks[name] = allowed[:, None]
    found: Tensor = layout.masks[name]
    return found


def _real_places(layout: Layout, number: int, batch: _Batch) -> Tensor:
    name = ("places", number)
    if name not in layout.masks:
        layout.masks[name] = batch.real.flatten().nonzero()[:, 0]
    found: Tensor = layout.masks[name]
    return found
