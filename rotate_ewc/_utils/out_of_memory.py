"""Tell whether an error says that memory has run out, on whatever device, and say what for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def naming_matrix(
    doing: str, size: int, dtype: torch.dtype, columns: int | None = None
) -> Iterator[None]:
    """Say for which matrix, and how large it is, where memory runs out.

    Args:
        doing: What is done with it, such as `"the decomposition of the thing"`.
        size: Its rows.
        dtype: Its dtype.
        columns: Its columns; None is as many.
    """
    shape = [size, size if columns is None else columns]
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryError(
            f"out of memory in {doing}, a matrix {shape} of {math.prod(shape) * dtype.itemsize:,} "
            f"bytes ({error})"
        ) from None


@contextmanager
def advising(advice: str) -> Iterator[None]:
    """Say what to do where memory runs out."""
    try:
        yield
    except MemoryError as error:
        raise MemoryError(f"{error}; {advice}") from None
