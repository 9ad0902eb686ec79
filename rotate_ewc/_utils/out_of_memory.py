"""Tell whether an error says that memory has run out, on whatever device."""

from __future__ import annotations

from typing import Final

import torch

# What allocators say that have no error of their own: those of the CPU, of MPS, and of cuBLAS.
_MESSAGES: Final = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "alloc_failed",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there was not enough memory, on whatever device."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(message in text for message in _MESSAGES)
