"""Out of memory: how the errors look, and what can be freed."""

from __future__ import annotations

import gc

import torch

_TEXTS = (
    "out of memory",
    "can't allocate memory",  # torch on the CPU, Linux
    "not enough memory",  # torch on the CPU, Windows
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that there was not enough memory; on the CPU torch raises a plain RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _TEXTS)


def free_cached() -> None:
    """Give back what is not in use any longer."""
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
