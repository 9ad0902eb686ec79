"""Snapshots in a smaller dtype: the allowed dtypes, and a check of rounded bases."""

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
# Bases from `eigh` deviate by about ten rounding errors, and by 0.003 once cast to bfloat16.
_LARGEST_DEVIATION: Final = 0.02

# Number of random vectors v for which QᵀQ v = v is checked; each depends on every entry of Q.
_PROBES: Final = 4


def loadable_dtypes(own: torch.dtype) -> list[torch.dtype]:
    """Return the dtypes that a tensor may be stored in: its own first, and all smaller ones."""
    return [own, *(known for known in DTYPES.values() if known.itemsize < own.itemsize)]


def check_orthonormal(key: str, basis: Tensor) -> None:
    """Raise unless the columns of a basis are orthonormal, up to the rounding of bfloat16.

    `QᵀQ v = v` is checked for a few random vectors v, in a fraction of the time that all of `QᵀQ`
    would take.

    Args:
        key: Its key, for the message.
        basis: `[groups, d, k]`.

    Raises:
        SnapshotError: If they are not orthonormal.
    """
    if not basis.numel():
        # An empty basis may have any number of groups.
        return
    groups, _, size = basis.shape
    generator = torch.Generator().manual_seed(size)
    probes = torch.randn(groups, size, _PROBES, generator=generator, dtype=torch.float64)
    computed = torch.promote_types(basis.dtype, torch.float32)
    vectors, q = probes.to(basis.device, computed), basis.to(computed)
    missed = torch.linalg.vector_norm(q.mT @ (q @ vectors) - vectors, dim=1)
    error = (missed / torch.linalg.vector_norm(vectors, dim=1)).max().item()
    # Negated so that NaN fails too.
    if not error <= _LARGEST_DEVIATION:
        raise SnapshotError(
            f"snapshot key {key!r} is not orthonormal: |QᵀQv - v| / |v| is {error:.2g}; expected "
            f"at most {_LARGEST_DEVIATION}: load an undamaged copy"
        )
