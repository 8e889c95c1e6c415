"""What torch ran under a mode: names of operations, matrix products, the largest tensor put out."""

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = {"mm", "addmm", "addmm_", "bmm"}


class Dispatched(TorchDispatchMode):
    """Sees the operations of the backward pass too."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.products = self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.names.add(name)
        self.products += name in PRODUCTS
        for part in out if isinstance(out, tuple | list) else (out,):
            if isinstance(part, Tensor):
                self.numel = max(self.numel, part.numel())
        return out
