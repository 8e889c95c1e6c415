"""Counts the bytes of tensors that are alive, to hold plans of memory against real steps; and memory that
runs out."""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hafrm.engine.layout import Layout
from hafrm.engine.model import HybridModel, Outputs
from hafrm.scoring import forward


class LiveBytes(TorchDispatchMode):
    """Adds up the bytes of all storages made under it and alive."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and id(tensor.untyped_storage()) not in self._seen:
                storage = tensor.untyped_storage()
                self._seen.add(id(storage))
                self.alive += storage.nbytes()
                self.peak = max(self.peak, self.alive)
                weakref.finalize(storage, self._forget, id(storage), storage.nbytes())
        return result

    def _forget(self, storage: int, num_bytes: int) -> None:
        self._seen.discard(storage)
        self.alive -= num_bytes


def short_of_memory(monkeypatch: pytest.MonkeyPatch, limit: int, *, training: bool) -> None:
    """Every forward, in training or without gradients, of more than `limit` tokens fails as CUDA's does."""
    run = HybridModel.forward

    def limited(self: HybridModel, layout: Layout) -> Outputs:
        if torch.is_grad_enabled() == training and layout.num_tokens > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return run(self, layout)

    monkeypatch.setattr(HybridModel, "forward", limited)
    monkeypatch.setattr(forward, "free_memory", lambda: None)  # slow, and nothing is short here
