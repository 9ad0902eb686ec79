"""Dtypes in which tensors are kept where they are to take less room than those they are used in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

# An entry of a basis is at most 1, so float16 has the range for it; not for eigenvalues.
OF_BASES: Final = (torch.float32, torch.bfloat16, torch.float16)
OF_FILES: Final = (torch.float64, torch.float32, torch.bfloat16)


def as_storage_dtype(value: object, allowed: Sequence[torch.dtype]) -> torch.dtype | None:
    """Return a dtype, given as one or by its name; None stands for the tensors' own.

    Args:
        value: What a user has given as `storage_dtype`.
        allowed: The dtypes that there are: `OF_BASES` or `OF_FILES`.

    Raises:
        ValueError: If it is none of these.
    """
    if value is None:
        return None
    names = {dtype_name(dtype): dtype for dtype in allowed}
    for name, dtype in names.items():
        if value in (dtype, name):
            return dtype
    advice = "" if torch.float16 in allowed else " (float16 has too small a range for eigenvalues)"
    raise ValueError(
        f"storage_dtype is {value!r}; expected one of {', '.join(names)} (of torch, or their "
        f"names), or None for the tensors' own{advice}"
    )


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name without that of the package."""
    return str(dtype).removeprefix("torch.")


def stored_dtype(own: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """Return the dtype that a tensor is stored in: never more than its own."""
    return own if wanted is None or wanted.itemsize >= own.itemsize else wanted
