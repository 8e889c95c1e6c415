"""Telling "out of memory" from other errors, and giving back what a failed pass still holds."""

import gc

import torch

_CPU_ALLOCATOR = "DefaultCPUAllocator: can't allocate memory"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a pass failed for want of memory, on any device."""
    return isinstance(error, torch.OutOfMemoryError) or _CPU_ALLOCATOR in str(error)


def give_back() -> None:
    """Free what the failed pass left behind; call it when its exception is gone, which holds tensors."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
