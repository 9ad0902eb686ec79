"""Blocks whose bases are kept in a smaller dtype than they are computed with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import reduce

import torch
from torch import Tensor

from rotate_ewc._utils.storage_dtype import stored_dtype
from rotate_ewc._utils.tree import place_of
from rotate_ewc.linalg.block import Block
from rotate_ewc.linalg.kronecker import Basis
from rotate_ewc.linalg.orthonormal import restored_basis


def stored_in(blocks: Iterable[Block], dtype: torch.dtype | None) -> tuple[Block, ...]:
    """Return blocks with their bases in a dtype, or in that of the eigenvalues if it is smaller.

    What several blocks share they share afterwards.

    Args:
        blocks: The blocks.
        dtype: What to keep bases in; None leaves them as they are.
    """
    blocks = tuple(blocks)
    if dtype is None:
        return blocks
    known: dict[object, Tensor] = {}

    def stored(basis: Basis, own: torch.dtype) -> Basis:
        if basis is None:
            return None
        wanted = stored_dtype(own, dtype)
        if basis.dtype == wanted:
            return basis
        place = place_of(basis), own
        if place not in known:
            known[place] = restored_basis(basis, own).to(wanted)
        return known[place]

    return tuple(
        replace(
            block,
            gradient_basis=stored(block.gradient_basis, block.eigenvalues.dtype),
            activation_basis=stored(block.activation_basis, block.eigenvalues.dtype),
        )
        for block in blocks
    )


def common_storage_dtype(blocks: Iterable[Block]) -> torch.dtype | None:
    """Return the smallest dtype that has what the bases of all blocks have; None without bases."""
    dtypes = [
        basis.dtype
        for block in blocks
        for basis in (block.gradient_basis, block.activation_basis)
        if basis is not None
    ]
    return reduce(torch.promote_types, dtypes) if dtypes else None
