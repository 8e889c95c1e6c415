"""Spare the last layer the tokens that no head reads.

Heads read response tokens and the last token of each prompt (or, without log-probs, the last token of each
response). Of all other tokens the last layer owes only keys and values: its queries, its attention's
output product and its MLP need not run for them. No model code is touched: hooks narrow the input of
those modules to the rows that are read and put their output back into place. What other rows then hold is
read by nobody; the first-batch check compares with a run that spares nothing.
"""

import threading
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

TOKENWISE = ("mlp", "self_attn.q_proj", "self_attn.o_proj", "self_attn.dense")
"""Modules of a decoder layer that treat every token alone, by the names that most families give them."""

ATTENTION = ("self_attn", "attn", "attention", "self_attention")
"""Modules that get a layer's keywords, among them the rows to read, and run first in it."""

READ_ROWS = "read_rows"
"""The keyword by which a forward tells its layers which rows will be read."""


def narrow(layer: nn.Module) -> list[str]:
    """Let a model's last layer run no more than the rows given as READ_ROWS; the names of what is narrowed.

    A forward without that keyword is left whole. Asking again changes nothing; a layer that is built
    otherwise is left as it is (an empty list).
    """
    known: _Narrowed | None = getattr(layer, "_hafrm_narrowed", None)
    if known is None:
        known = _Narrowed(layer)
        layer._hafrm_narrowed = known  # type: ignore[assignment]
    return list(known.hooked)


def widen(layer: nn.Module) -> None:
    """Take the hooks away again."""
    known: _Narrowed | None = getattr(layer, "_hafrm_narrowed", None)
    if known is not None:
        known.remove()
        del layer._hafrm_narrowed


class _Narrowed:
    """What was hooked into one layer."""

    def __init__(self, layer: nn.Module) -> None:
        modules = dict(layer.named_modules())
        # Not at the layer: checkpointing repeats its forward without its hooks, on a GPU in another thread.
        begins = [modules[name] for name in ATTENTION if name in modules]
        self.hooked = [name for name in TOKENWISE if begins and _is_tokenwise(modules.get(name))]
        self._handles = [m.register_forward_pre_hook(_begin, with_kwargs=True) for m in begins]
        for name in self.hooked:
            self._handles.append(modules[name].register_forward_pre_hook(_take))
            self._handles.append(modules[name].register_forward_hook(_put_back))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


class _Forward(threading.local):
    """The rows that the last layer of this thread's forward runs, of how many tokens."""

    rows: Tensor | None = None
    tokens = 0


_forward = _Forward()
# Functions and not methods, so that a model with these hooks can be copied.


def _begin(_: nn.Module, __: Any, kwargs: dict[str, Any]) -> None:
    _forward.rows = kwargs.get(READ_ROWS)


def _take(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    if _forward.rows is None:
        return None
    _forward.tokens = inputs[0].shape[1]
    return _take_rows(inputs[0][0], _forward.rows)[None], *inputs[1:]


def _put_back(module: nn.Module, _: Any, output: Any) -> Tensor | None:
    if _forward.rows is None:
        return None
    assert isinstance(output, Tensor), f"{type(module).__name__} gives more than a tensor"
    return _put_rows(output[0], _forward.rows, _forward.tokens)[None]


def _is_tokenwise(module: nn.Module | None) -> bool:
    """A mixture of experts may look at all tokens at once, and give back more than its output."""
    return module is not None and not any("experts" in name for name, _ in module.named_modules())


def _take_rows(x: Float[Tensor, "tokens dim"], rows: Int[Tensor, " read"]) -> Tensor:
    apply: Any = _TakeRows.apply
    taken: Tensor = apply(x, rows)
    return taken


def _put_rows(x: Float[Tensor, "read dim"], rows: Int[Tensor, " read"], tokens: int) -> Tensor:
    apply: Any = _PutRows.apply
    put: Tensor = apply(x, rows, tokens)
    return put


class _TakeRows(torch.autograd.Function):
    """x[rows] for distinct rows: the gradient is copied into place, where indexing would add it up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.rows, ctx.tokens = rows, len(x)
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        whole = grads[0].new_zeros(ctx.tokens, grads[0].shape[1])
        return whole.index_copy_(0, ctx.rows, grads[0]), None


class _PutRows(torch.autograd.Function):
    """Zeros with x at `rows`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, tokens: int) -> Tensor:
        # Not saved for backward: a checkpointed layer would run its last product again to see it.
        ctx.rows = rows
        return x.new_zeros(tokens, x.shape[1]).index_copy_(0, rows, x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].index_select(0, ctx.rows), None, None
