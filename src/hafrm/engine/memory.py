"""Telling "out of memory" from other errors, and giving back what a failed pass still holds."""

import gc

import torch

_MESSAGES = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
"""Of errors of other types: a CPU's, and those of CUDA and its libraries beside torch's allocator."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a pass failed for want of memory, on any device."""
    return isinstance(error, torch.OutOfMemoryError) or any(m in str(error) for m in _MESSAGES)


def give_back() -> None:
    """Free what the failed pass left behind; call it when its exception is gone, which holds tensors."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
