"""Spare the last layer what no reward depends on.

A reward is read at the last token of a response, so in the last layer only keys and values are needed of
the other tokens: queries, the attention's output product and the MLP run for the last tokens alone. That
is four fifths of one layer's products. No model code is touched: forward hooks narrow the input of those
modules and put their output back into place, and only for a layout that says that nothing else is read.
"""

import dataclasses
import threading
from typing import Any

from torch import Tensor, nn

from hafrm.engine.layout import Layout
from hafrm.engine.model import HybridModel

TOKENWISE = ("mlp", "self_attn.q_proj", "self_attn.o_proj")
"""Modules of a decoder layer that treat every token alone, by the names that most families give them."""

_MARK = "_hafrm_narrowed"
"""On a layer that has its hooks."""


class LastTokens(Layout):
    """A layout of whose tokens only the last of each response will be read."""

    @classmethod
    def of(cls, layout: Layout) -> "LastTokens":
        """The same layout, with the promise."""
        return cls(**{f.name: getattr(layout, f.name) for f in dataclasses.fields(layout)})


def narrow_last_layer(model: HybridModel) -> list[str]:
    """Let the last layer run for last tokens alone, under a LastTokens; the names of what is narrowed.

    Without effect (an empty list) on a model whose layers are built otherwise. Asking again is harmless.
    """
    layers = getattr(model.backbone, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        return []
    last = layers[-1]
    found = [name for name in TOKENWISE if name in dict(last.named_modules())]
    if not hasattr(last, _MARK):
        setattr(last, _MARK, True)
        rows = _Rows()
        last.register_forward_pre_hook(rows.note, with_kwargs=True)
        for name in found:
            last.get_submodule(name).register_forward_pre_hook(rows.take)
            last.get_submodule(name).register_forward_hook(rows.put_back)
    return found


class _Rows(threading.local):
    """The layout of the forward that this thread is in, if only last tokens are read of it."""

    layout: LastTokens | None = None

    def note(self, _: nn.Module, __: Any, kwargs: dict[str, Any]) -> None:
        layout = kwargs.get("branch_layout")
        self.layout = layout if isinstance(layout, LastTokens) else None

    def take(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if self.layout is None:
            return None
        return inputs[0][:, self.layout.last], *inputs[1:]

    def put_back(self, _: nn.Module, __: Any, output: Tensor) -> Tensor | None:
        if self.layout is None:
            return None
        whole = output.new_zeros(1, self.layout.num_tokens, output.shape[-1])
        whole[:, self.layout.last] = output
        return whole
