"""Snapshots in a smaller dtype: how tensors are rounded, and bases orthogonalised again."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from rotate_ewc.errors import SnapshotError

DTYPES: Final = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_STORABLE: Final = (torch.float64, torch.float32, torch.bfloat16)

# Bases from `eigh` deviate by about ten rounding errors, and by 0.003 once cast to bfloat16.
_LARGEST_DEVIATION: Final = 0.02

# Number of random vectors v for which QᵀQ v = v is checked; each depends on every entry of Q.
_PROBES: Final = 4


def check_storage_dtype(dtype: object) -> None:
    """Raise unless a snapshot can be stored in a dtype; None stands for its own."""
    if dtype is not None and dtype not in _STORABLE:
        raise ValueError(
            f"dtype is {dtype}; expected one of {', '.join(map(str, _STORABLE))}, or None (float16 "
            f"has too small a range for eigenvalues)"
        )


def stored_dtype(own: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """Return the dtype that a tensor is stored in: never more than its own."""
    return own if wanted is None or wanted.itemsize >= own.itemsize else wanted


def loadable_dtypes(own: torch.dtype) -> list[torch.dtype]:
    """Return the dtypes that a tensor may be stored in: its own first, and all smaller ones."""
    return [own, *(known for known in DTYPES.values() if known.itemsize < own.itemsize)]


def restored_basis(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a basis in its own dtype.

    The orthogonality that rounding has cost is restored, up to its square, by one step of the
    Newton-Schulz iteration for the polar factor, `Q ← Q (3 I - QᵀQ) / 2` (Higham 2008, *Functions
    of Matrices*, §8.3).

    Args:
        stored: `[groups, d, k]`, orthonormal up to the rounding of its dtype.
        dtype: The dtype it had.
    """
    basis = stored.to(dtype)
    if stored.dtype == dtype:
        return basis
    return 1.5 * basis - 0.5 * basis @ (basis.mT @ basis)


def check_orthonormal(key: str, basis: Tensor) -> None:
    """Raise unless the columns of a basis are orthonormal, up to the rounding of bfloat16.

    `QᵀQ v = v` is checked for a few random vectors v, in a fraction of the time that all of `QᵀQ`
    would take.

    Args:
        key: Its key, for the message.
        basis: `[groups, d, k]`.

    Raises:
        SnapshotError: If they are not.
    """
    if not basis.numel():
        # The number of groups may be any, if they are empty.
        return
    groups, _, size = basis.shape
    generator = torch.Generator().manual_seed(size)
    probes = torch.randn(groups, size, _PROBES, generator=generator, dtype=torch.float64)
    computed = torch.promote_types(basis.dtype, torch.float32)
    vectors, q = probes.to(basis.device, computed), basis.to(computed)
    missed = torch.linalg.vector_norm(q.mT @ (q @ vectors) - vectors, dim=1)
    error = (missed / torch.linalg.vector_norm(vectors, dim=1)).max().item()
    # Written so that NaN fails too.
    if not error <= _LARGEST_DEVIATION:
        raise SnapshotError(
            f"snapshot key {key!r} is not orthonormal: |QᵀQv - v| / |v| is {error:.2g}; expected "
            f"at most {_LARGEST_DEVIATION}"
        )
