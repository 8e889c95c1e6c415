"""Shared-prefix attention, registered once with transformers' AttentionInterface; the last layer's hooks.

Every segment (one per response) is a causal attention call, bottom-right aligned: queries
`[prompt + first branch | second branch | ...]`, keys `[prompt + branch]` for each. On CUDA in half
precision this is one varlen call per layer; what that kernel cannot do runs there in masked batches of
groups of similar length, padded to the longest. CPUs run one segment at a time, which is the reference
implementation. No `[tokens, tokens]` mask is ever built. The layout arrives as a keyword that transformers
passes down.

The last layer runs only the tokens that a head reads: response tokens and the last of each prompt (or,
without log-probs, the last of each response). For all others it only computes keys and values.
"""

import functools
import inspect
import threading
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from hafrm.engine.layout import Layout, Team
from hafrm.errors import ModelError

SHARED_PREFIX = "hafrm_shared_prefix"  # the name under which transformers knows this attention

try:  # CUDA only; private in older releases of torch
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # pragma: no cover - torch before 2.10
    varlen_attn = None  # type: ignore[assignment]

_PARAMETERS = set() if varlen_attn is None else set(inspect.signature(varlen_attn).parameters)
# Releases before 2.11 lack a scale or a window: they use padded groups.
_VARLEN_COMPLETE = {"scale", "window_size"} <= _PARAMETERS
READ_INDICES = "read_indices"  # the keyword that tells layers which tokens will be read
_TOKENWISE = ("mlp", "self_attn.q_proj", "self_attn.o_proj", "self_attn.dense")
# modules of a layer that treat every token alone, by the names that most families give them
_ATTENTION = ("self_attn", "attn", "attention", "self_attention")
# modules that get a layer's keywords, the indices to read among them, and run first in it


@dataclass(frozen=True)
class Rule:
    """How attention scores are computed; the same for every token of a layer."""

    scaling: float | None = None  # factor of the products; None: 1 / sqrt(dim)
    window: int | None = None  # keys that a token sees, itself included; None: all before it
    softcap: float | None = None  # scores are capped to softcap * tanh(score / softcap) (Gemma-2)


class CannotShareError(ModelError):
    """The layers of a model cannot share prompts, for this reason."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"cannot share prompts: {reason}; set training.sharing: off")
        self.reason = reason


def shared_prefix_attention(  # noqa: PLR0913 - the signature is transformers'
    module: nn.Module,
    query: Float[Tensor, "1 heads tokens dim"],
    key: Float[Tensor, "1 kv_heads tokens dim"],
    value: Float[Tensor, "1 kv_heads tokens value_dim"],
    attention_mask: Tensor | None = None,
    *,
    scaling: float | None = None,
    branch_layout: Layout | None = None,
    team: Team | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **unused: Any,
) -> tuple[Float[Tensor, "1 tokens heads value_dim"], None]:
    """Attention output of every token over its own prompt and its own branch; returns no weights."""
    if branch_layout is None or attention_mask is not None:
        raise CannotShareError("its layers give the attention no layout, or a mask of their own")
    if unused.get("s_aux") is not None:
        raise CannotShareError("it has attention sinks")
    # The meta device, on which memory is planned, has no autocast.
    if not query.is_meta and torch.is_autocast_enabled(query.device.type):
        # Float32 rotary factors have made query and key float32; the kernels need half precision.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    rule = Rule(scaling, sliding_window or getattr(module, "sliding_window", None), softcap)
    if team is None:
        return _attend(query, key, value, branch_layout, rule), None
    return _attend_together(query, key, value, branch_layout, rule, team), None


AttentionInterface.register(SHARED_PREFIX, shared_prefix_attention)


# A compiled layer breaks its graph here; else it would recompile for each sequence's lengths.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _attend(query: Tensor, key: Tensor, value: Tensor, layout: Layout, rule: Rule) -> Tensor:
    if not query.is_cuda:
        return attend_by_segment(query, key, value, layout, rule)
    card = torch.cuda.get_device_capability(query.device)
    if _VARLEN_COMPLETE and rule.softcap is None and _has_kernel(query, key, value, card):
        return _varlen(query, key, value, layout, rule)
    return attend_by_group(query, key, value, layout, rule)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _attend_together(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, rule: Rule, team: Team
) -> Tensor:
    query, key, value = (team.to_heads(x, layout) for x in (query, key, value))
    return team.to_tokens(_attend(query, key, value, layout, rule), layout)


def _has_kernel(query: Tensor, key: Tensor, value: Tensor, capability: tuple[int, int]) -> bool:
    return (
        query.dtype in (torch.float16, torch.bfloat16)
        and capability >= (8, 0)
        and value.shape[-1] <= query.shape[-1] == key.shape[-1] <= 256  # narrow values are padded
        and query.shape[-1] % 8 == 0
    )


def _varlen(query: Tensor, key: Tensor, value: Tensor, layout: Layout, rule: Rule) -> Tensor:
    dim = value.shape[-1]
    if dim < key.shape[-1]:
        value = F.pad(value, (0, key.shape[-1] - dim))
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [tokens, heads, dim]
    # Releases before 2.12 group heads without being asked to.
    grouped = query.shape[1] != key.shape[1]
    options: dict[str, Any] = {"enable_gqa": grouped} if "enable_gqa" in _PARAMETERS else {}
    output = varlen_attn(
        q.contiguous(),
        k.index_select(0, layout.key_index),  # a prompt's keys once for each of its branches
        v.index_select(0, layout.key_index),
        layout.cu_queries,
        layout.cu_keys,
        max(layout.query_lengths),
        max(layout.key_lengths),
        scale=rule.scaling,
        # transformers lets a token see `window` keys, itself included; the kernel sees left + 1
        window_size=(-1 if rule.window is None else rule.window - 1, 0),
        **options,
    )
    assert isinstance(output, Tensor)
    return output[None, ..., :dim].contiguous()


def attend_by_segment(
    query: Float[Tensor, "1 heads tokens dim"],
    key: Float[Tensor, "1 kv_heads tokens dim"],
    value: Float[Tensor, "1 kv_heads tokens value_dim"],
    layout: Layout,
    rule: Rule,
) -> Float[Tensor, "1 tokens heads value_dim"]:
    """Attention output of every token over its own prompt and its own branch, one call per response."""
    # split, not slices: its backward is one concatenation, that of a slice a gradient of the whole sequence
    queries, keys, values = (
        torch.split(x, layout.query_lengths, dim=2) for x in (query, key, value)
    )
    outputs: list[Tensor] = []
    for prompt, branches in layout.shape:
        first = len(outputs)  # the group's first segment holds its prompt
        for segment in range(first, first + len(branches)):
            k, v = keys[segment], values[segment]
            if segment > first:
                k = torch.cat([keys[first][:, :, :prompt], k], dim=2)
                v = torch.cat([values[first][:, :, :prompt], v], dim=2)
            mask = _segment_mask(layout, queries[segment].shape[2], k.shape[2], rule.window)
            outputs.append(_dense(queries[segment], k, v, mask, rule))
    return torch.cat([output.transpose(1, 2) for output in outputs], dim=1)


def _segment_mask(layout: Layout, queries: int, keys: int, window: int | None) -> Tensor | None:
    """A causal, bottom-right aligned, windowed mask; None if `is_causal` does the same for free."""
    if window is not None and window >= keys:
        window = None
    if queries == keys and window is None:
        return None

    def build() -> Tensor:
        allowed = torch.ones(queries, keys, dtype=torch.bool, device=layout.input_ids.device)
        allowed = allowed.tril(keys - queries)
        return allowed if window is None else allowed.triu(keys - queries - window + 1)

    return layout.once((queries, keys, window), build)


def _dense(
    q: Float[Tensor, "batch heads queries dim"],
    k: Float[Tensor, "batch kv_heads keys dim"],
    v: Float[Tensor, "batch kv_heads keys value_dim"],
    mask: Bool[Tensor, "... queries keys"] | Float[Tensor, "... queries keys"] | None,
    rule: Rule,
) -> Float[Tensor, "batch heads queries value_dim"]:
    """One call under `mask` (window and causality): booleans, or terms added to scores that are not capped;
    None: causal and square."""
    grouped = q.shape[1] != k.shape[1]
    if rule.softcap is None:
        causal, scale = mask is None, rule.scaling
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
        )
    # no fused kernel in torch caps scores
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
    scaling = q.shape[-1] ** -0.5 if rule.scaling is None else rule.scaling
    scores = rule.softcap * torch.tanh(q @ k.transpose(2, 3) * scaling / rule.softcap)
    if mask is None:
        mask = torch.ones_like(scores[0, 0], dtype=torch.bool).tril()
    scores = scores.masked_fill(~mask, float("-inf"))
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v


class _Batch(NamedTuple):
    indices: Int[Tensor, "groups longest"]  # in the sequence; padding repeats the group's first
    real: Bool[Tensor, "groups longest"]
    positions: Int[Tensor, "groups longest"]
    branches: Int[Tensor, "groups longest"]  # -1 for the prompt


def attend_by_group(
    query: Float[Tensor, "1 heads tokens dim"],
    key: Float[Tensor, "1 kv_heads tokens dim"],
    value: Float[Tensor, "1 kv_heads tokens value_dim"],
    layout: Layout,
    rule: Rule,
) -> Float[Tensor, "1 tokens heads value_dim"]:
    """Like `attend_by_segment`, with one masked call for each class of lengths."""
    outputs, places = [], []
    for number, batch in enumerate(layout.once("batches", lambda: _batches(layout))):
        indices, heads = batch.indices.flatten(), query.shape[1]
        q, k, v = (_gather(x, indices, len(batch.indices), heads) for x in (query, key, value))
        output = _dense(q, k, v, _group_mask(layout, number, batch, rule, query.dtype), rule)
        # nonzero() waits for a GPU: once per sequence, not in every layer
        real = layout.once(("real", number), batch.real.flatten().nonzero)[:, 0]
        outputs.append(output.transpose(1, 2).flatten(0, 1)[real])
        places.append(indices[real])
    back = torch.empty_like(torch.cat(places))
    back[torch.cat(places)] = torch.arange(len(back), device=back.device)
    return torch.cat(outputs)[back][None]


def _gather(x: Tensor, indices: Tensor, groups: int, heads: int) -> Tensor:
    """[1, kv_heads, tokens, dim] -> [groups, heads, longest, dim]: under a mask, fused kernels need keys
    for every query head."""
    picked = x[0].transpose(0, 1).index_select(0, indices)[:, :, None]
    every = picked.expand(-1, -1, heads // x.shape[1], -1).flatten(1, 2)
    return every.view(groups, -1, *every.shape[1:]).transpose(1, 2)


def _batches(layout: Layout) -> list[_Batch]:
    """Groups of similar length (up to one power of two), padded to the longest: the number of scores is at
    most four times the sum of the groups' squared lengths, never the sequence's squared length."""
    sizes = [prompt + sum(branches) for prompt, branches in layout.shape]
    starts = np.cumsum([0, *sizes])
    classes: dict[int, list[int]] = defaultdict(list)
    for group, size in enumerate(sizes):
        classes[(size - 1).bit_length()].append(group)
    return [_batch(layout, members, starts) for members in classes.values()]


def _batch(layout: Layout, members: list[int], starts: np.ndarray) -> _Batch:
    longest = max(int(starts[g + 1] - starts[g]) for g in members)
    longest = -(-longest // 8) * 8  # or the kernel copies the mask, in every layer
    indices = np.repeat(starts[members][:, None], longest, axis=1)
    real = np.zeros((len(members), longest), bool)
    positions = np.zeros((len(members), longest), np.int64)
    branches = np.full((len(members), longest), -1, np.int64)
    for i, group in enumerate(members):
        prompt, lengths = layout.shape[group]
        size = prompt + sum(lengths)
        indices[i, :size] += np.arange(size)
        real[i, :size] = True
        steps = [np.arange(prompt), *(prompt + np.arange(length) for length in lengths)]
        positions[i, :size] = np.concatenate(steps)
        branches[i, prompt:size] = np.repeat(np.arange(len(lengths)), lengths)
    device = layout.input_ids.device
    return _Batch(*(torch.from_numpy(x).to(device) for x in (indices, real, positions, branches)))


def _group_mask(
    layout: Layout, number: int, batch: _Batch, rule: Rule, dtype: torch.dtype
) -> Tensor:
    """[groups, 1, queries, keys]: booleans if scores are capped, else terms added to the scores."""

    def allow() -> Tensor:
        apart = batch.positions[:, :, None] - batch.positions[:, None, :]
        own = batch.branches[:, :, None] == batch.branches[:, None, :]
        allowed = (own | (batch.branches[:, None, :] == -1)) & (apart >= 0)
        if rule.window is not None:
            allowed &= apart < rule.window
        allowed &= batch.real[:, None, :] & batch.real[:, :, None]
        # padding sees itself: the softmax of a row that sees nothing is NaN
        allowed |= torch.eye(allowed.shape[1], dtype=torch.bool, device=allowed.device)
        return allowed[:, None]

    allowed = layout.once(("allowed", number, rule.window), allow)
    if rule.softcap is not None:
        return allowed

    def as_terms() -> Tensor:
        # of a boolean mask, torch would make these in every layer, and keep them for backward
        terms = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
        return terms.masked_fill_(~allowed, float("-inf"))

    return layout.once(("terms", number, rule.window, dtype), as_terms)


def checkpoint_around_compiled(layer: nn.Module) -> None:
    """Keep a layer's activation checkpoint, if it has one, outside of its compiled graphs."""
    checkpoint: Any = getattr(layer, "_gradient_checkpointing_func", None)
    if checkpoint is None:
        return
    compiled = functools.cache(functools.partial(torch.compile, dynamic=True))

    # inside, it would not survive the graph's break around attention, and nothing would be compiled
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def run(forward: functools.partial[Any], *inputs: Any) -> Any:
        again = functools.partial(compiled(forward.func), *forward.args, **forward.keywords)
        return checkpoint(again, *inputs)

    layer._gradient_checkpointing_func = run


def narrow_layer(layer: nn.Module) -> list[str]:
    """Let a model's last layer run only the indices passed as READ_INDICES, if any. Returns the names of
    the narrowed modules: none in a layer of unknown structure."""
    if not hasattr(layer, "_hafrm_hooks"):
        modules = dict(layer.named_modules())
        # Not at the layer: checkpointing repeats its forward without its hooks, on a GPU in another thread.
        starts = [modules[name] for name in _ATTENTION if name in modules]
        # a mixture of experts may look at all tokens at once, and return more than its output
        mixtures = [name for name in modules if "experts" in name]
        tokenwise = [n for n in _TOKENWISE if not any(name.startswith(n) for name in mixtures)]
        names = [n for n in tokenwise if starts and n in modules]
        handles = [m.register_forward_pre_hook(_note, with_kwargs=True) for m in starts]
        for name in names:
            handles.append(modules[name].register_forward_pre_hook(_take))
            handles.append(modules[name].register_forward_hook(_put_back))
        layer._hafrm_hooks = names, handles  # type: ignore[assignment]
    return list(layer._hafrm_hooks[0])  # type: ignore[index]


def widen_layer(layer: nn.Module) -> None:
    """Remove the hooks of `narrow_layer`."""
    if hasattr(layer, "_hafrm_hooks"):
        for handle in layer._hafrm_hooks[1]:  # type: ignore[index]
            handle.remove()
        del layer._hafrm_hooks


class _Forward(threading.local):
    indices: Tensor | None = None  # that the last layer of this thread's forward runs
    num_tokens = 0


_forward = _Forward()
# The hooks are functions and not methods, so that a model that has them can be copied.


def _note(_: nn.Module, __: Any, kwargs: dict[str, Any]) -> None:
    _forward.indices = kwargs.get(READ_INDICES)


def _take(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    if _forward.indices is None:
        return None
    _forward.num_tokens = inputs[0].shape[1]
    return inputs[0].index_select(1, _forward.indices), *inputs[1:]


def _put_back(module: nn.Module, _: Any, output: Any) -> Tensor | None:
    if _forward.indices is None:
        return None
    assert isinstance(output, Tensor), f"{type(module).__name__} gives more than a tensor"
    apply: Any = _PutTokens.apply
    whole: Tensor = apply(output[0], _forward.indices, _forward.num_tokens)[None]
    return whole


class _PutTokens(torch.autograd.Function):
    """Zeros with x at `indices`."""

    @staticmethod
    def forward(
        ctx: Any, x: Float[Tensor, "read dim"], indices: Int[Tensor, " read"], num_tokens: int
    ) -> Float[Tensor, "tokens dim"]:
        # Not saved for backward: a checkpointed layer would run its last product again to see it.
        ctx.indices = indices
        return x.new_zeros(num_tokens, x.shape[1]).index_copy_(0, indices, x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].index_select(0, ctx.indices), None, None
