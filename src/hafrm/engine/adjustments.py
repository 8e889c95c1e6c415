"""What is changed in a stock model's modules before it runs: dropout, slow activations, checkpoints."""

import functools
from typing import Any

import torch
from torch import nn
from transformers.activations import NewGELUActivation


def switch_off_dropout(module: nn.Module) -> None:
    """Every dropout probability and router jitter to zero: two forwards of one batch must agree."""
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        # Some layers keep the rate as a number, some read it from their config (Falcon).
        for owner in (part, getattr(part, "config", None)):
            for name, value in vars(owner).items() if owner is not None else ():
                if ("drop" in name or "jitter" in name) and isinstance(value, float):
                    setattr(owner, name, 0.0)


def fuse_gelu(module: nn.Module) -> None:
    """Replace GPT-2's and Phi's GELU of nine operations by torch's single one of the same formula.

    float32 outputs differ by up to 5e-7. The config, and so what is exported, names the model's own.
    """
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, NewGELUActivation):
                setattr(parent, name, nn.GELU(approximate="tanh"))


def checkpoint_around_compiled(layer: nn.Module) -> None:
    """Keep a layer's checkpoint, if it has one, outside of its compiled graphs: inside, it would not
    survive the break around attention, and nothing would be compiled."""
    checkpoint: Any = getattr(layer, "_gradient_checkpointing_func", None)
    if checkpoint is None:
        return
    compiled = functools.cache(functools.partial(torch.compile, dynamic=True))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def run(forward: functools.partial[Any], *inputs: Any) -> Any:
        again = functools.partial(compiled(forward.func), *forward.args, **forward.keywords)
        return checkpoint(again, *inputs)

    layer._gradient_checkpointing_func = run
