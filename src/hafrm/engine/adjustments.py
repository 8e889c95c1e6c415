"""What is changed in a stock model's modules before it runs, through hooks and attributes alone.

The last layer runs only the tokens that a head reads: response tokens and the last of each prompt (or,
without log-probs, the last of each response). Of all others it makes keys and values alone.
"""

import copy
import functools
import threading
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.activations import NewGELUActivation

_RATES = "_hafrm_rates"  # where a config keeps the rates that it came with
READ_INDICES = "read_indices"  # the keyword that tells layers which tokens will be read
_TOKENWISE = ("mlp", "self_attn.q_proj", "self_attn.o_proj", "self_attn.dense")
# modules of a layer that treat every token alone, by the names that most families give them
_ATTENTION = ("self_attn", "attn", "attention", "self_attention")
# modules that get a layer's keywords, the indices to read among them, and run first in it


def switch_off_dropout(module: nn.Module) -> None:
    """Every dropout probability and router jitter to zero: two forwards of one batch must agree."""
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        # Some layers keep the rate as a number, some read it from their config (Falcon).
        for owner in (part, getattr(part, "config", None)):
            for name, value in list(vars(owner).items()) if owner is not None else ():
                if ("drop" in name or "jitter" in name) and isinstance(value, float) and value:
                    setattr(owner, name, 0.0)
                    if isinstance(owner, PretrainedConfig):
                        vars(owner).setdefault(_RATES, {})[name] = value


def with_dropout(config: PretrainedConfig) -> PretrainedConfig:
    """A copy of a config with the rates that `switch_off_dropout` set to zero, as it is exported."""
    config = copy.deepcopy(config)
    for part in (config, *[v for v in vars(config).values() if isinstance(v, PretrainedConfig)]):
        for name, rate in vars(part).pop(_RATES, {}).items():
            setattr(part, name, rate)
    return config


def fuse_gelu(module: nn.Module) -> None:
    """Replace GPT-2's and Phi's GELU of nine operations by torch's single one; the config names its own."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, NewGELUActivation):
                setattr(parent, name, nn.GELU(approximate="tanh"))


def checkpoint_around_compiled(layer: nn.Module) -> None:
    """Keep a layer's checkpoint, if it has one, outside of its compiled graphs."""
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
    """Let a model's last layer run only the indices passed as READ_INDICES, if any; names of what is
    narrowed: nothing in a layer of another build."""
    if not hasattr(layer, "_hafrm_hooks"):
        modules = dict(layer.named_modules())
        # Not at the layer: checkpointing repeats its forward without its hooks, on a GPU in another thread.
        starts = [modules[name] for name in _ATTENTION if name in modules]
        names = [n for n in _TOKENWISE if starts and _is_tokenwise(modules.get(n))]
        handles = [m.register_forward_pre_hook(_note, with_kwargs=True) for m in starts]
        for name in names:
            handles.append(modules[name].register_forward_pre_hook(_take))
            handles.append(modules[name].register_forward_hook(_put_back))
        layer._hafrm_hooks = names, handles  # type: ignore[assignment]
    return list(layer._hafrm_hooks[0])  # type: ignore[index]


def widen_layer(layer: nn.Module) -> None:
    """Take the hooks of `narrow_layer` away again."""
    if hasattr(layer, "_hafrm_hooks"):
        for handle in layer._hafrm_hooks[1]:  # type: ignore[index]
            handle.remove()
        del layer._hafrm_hooks


def _is_tokenwise(module: nn.Module | None) -> bool:
    # a mixture of experts may look at all tokens at once, and give back more than its output
    return module is not None and not any("experts" in name for name, _ in module.named_modules())


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
