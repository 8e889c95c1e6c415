"""What this machine can do, measured: matrix products and memory bandwidth; and the floor that follows.

The floor of a piece of work is the larger of FLOPs / peak products and bytes / peak bandwidth: no code that
does this work can be faster on this machine.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Peaks:
    """Best of several tries."""

    flops: float
    """FLOP/s of a square matrix product in the dtype of the run."""
    bandwidth: float
    """Bytes/s of a copy, read and write counted."""

    def floor(self, flops: float, moved: float) -> float:
        """Seconds below which this much work cannot go."""
        return max(flops / self.flops, moved / self.bandwidth)


def measure(device: torch.device, dtype: torch.dtype) -> Peaks:
    """Both peaks, in about a second."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = _best(lambda: a @ b, device)
    big = torch.empty(256 * 2**20, dtype=torch.uint8, device=device)
    other = torch.empty_like(big)
    copy = _best(lambda: other.copy_(big), device)
    return Peaks(flops=2 * size**3 / product, bandwidth=2 * big.numel() / copy)


def _best(run: Callable[[], object], device: torch.device, tries: int = 6) -> float:
    seconds = []
    for _ in range(tries):
        synchronise(device)
        start = time.perf_counter()
        run()
        synchronise(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def synchronise(device: torch.device) -> None:
    """Wait for the device's work, so that a clock may be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
