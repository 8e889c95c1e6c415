"""Errors that mean "out of memory", by their types and by what torch writes into others."""

import pytest
import torch

from hafrm.engine.packing import is_out_of_memory


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
    ],
)
def test_a_want_of_memory_is_recognised_whichever_library_lacks_it(error):
    assert is_out_of_memory(error)


def test_other_errors_are_no_want_of_memory():
    assert not is_out_of_memory(
        RuntimeError("CUDA error: an illegal memory access was encountered")
    )
