"""The new basis of one side when blocks are merged, from what each block has there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rotate_ewc._utils.numerics import full_precision
from rotate_ewc.linalg import kronecker
from rotate_ewc.linalg.eigh import eigenbasis
from rotate_ewc.linalg.kronecker import Basis


@dataclass(frozen=True, eq=False)
class Side:
    """One side of a block that is merged with others.

    Attributes:
        basis: `[groups, D, k]`, with rows of zeros where the parameter has grown from d to D; None
            is the identity, and then d is D.
        size: d.
        weights: The block's partial trace in these directions, `[groups, K]`; where k is less than
            d, the last is that of each direction of the complement.
    """

    basis: Basis
    size: int
    weights: Tensor

    @property
    def rank(self) -> int:
        """k, the number of directions that are kept."""
        return self.size if self.basis is None else self.basis.shape[2]

    @property
    def is_thin(self) -> bool:
        """Whether that is not all of them."""
        return self.rank < self.size

    def overlaps(self, new_basis: Basis, new_size: int) -> Basis:
        """Return the squared overlaps of new directions with those of the side."""
        return kronecker.overlaps(self.basis, self.size, new_basis, new_size)


@full_precision
def merged_basis(sides: Sequence[Side], size: int, label: str) -> Basis:
    """Return eigenvectors of the sum of the sides' partial traces.

    That of a thin side is `U diag(w - c) Uᵀ + c I`, with c that of the complement. So where all are
    thin, all eigenvectors that need be known are in the span of their bases, and nothing larger is
    decomposed.

    Args:
        sides: One for each block.
        size: D, of the parameter now.
        label: What to call the sum in messages.

    Returns:
        `[groups, D, l]`: all directions, or those that differ from the rest; None where every basis
        is the identity.
    """
    if not any(side.is_thin for side in sides):
        return kronecker.merged_basis([s.basis for s in sides], [s.weights for s in sides], label)
    sides = _nonzero(sides)
    if all(side.is_thin for side in sides):
        return _in_span(sides, _pieces(sides, size), label)
    return _of_all(sides, size, label)


def merged_rank(sides: Sequence[Side]) -> int | None:
    """Return how many directions to keep of a sum: as many as the side with the most.

    None is all, as where a side that is not zero keeps all of its own.
    """
    present = _nonzero(sides)
    return max(s.rank for s in present) if all(s.is_thin for s in present) else None


def _nonzero(sides: Sequence[Side]) -> Sequence[Side]:
    """Return the sides of blocks that are not zero; all of them if none is."""
    return [side for side in sides if bool(side.weights.any())] or sides


def _pieces(sides: Sequence[Side], size: int) -> Tensor:
    """Return the thin bases next to each other, `[groups, D, columns]`.

    The complement of a side ends where its parameter ended when it was made. Cut there, the columns
    span a space that holds the eigenvectors of the sum.
    """
    ends = sorted({side.size for side in sides} | {size})
    pieces = []
    for side in sides:
        if side.basis is None:
            continue
        start = 0
        for end in ends:
            if start < side.size:
                piece = torch.zeros_like(side.basis)
                piece[:, start:end] = side.basis[:, start:end]
                pieces.append(piece)
            start = end
    return torch.cat(pieces, dim=2)


def _in_span(sides: Sequence[Side], pieces: Tensor, label: str) -> Tensor:
    """Return the eigenvectors in the span of the pieces.

    Rows in which all are zero stay so: of inputs and outputs that are never on.
    """
    live = pieces.ne(0).any(dim=2).any(dim=0).nonzero().flatten()
    vectors, values, _ = torch.linalg.svd(pieces[:, live], full_matrices=False)
    # What several have in common counts once: it is known to the root of the rounding error, since
    # squares of overlaps are what becomes of it.
    smallest = torch.finfo(values.dtype).eps ** 0.5 * values[:, :1]
    rank = max(1, int((values > smallest).sum(dim=1).max()))
    span = pieces.new_zeros(*pieces.shape[:2], rank)
    span[:, live] = vectors[:, :, :rank]
    total = pieces.new_zeros(len(pieces), rank, rank)
    for side in sides:
        if side.basis is None:
            continue
        kept, rest = side.weights[:, None, :-1], side.weights[:, None, -1:]
        seen = span.mT @ side.basis
        within = span[:, : side.size]
        total += (seen * (kept - rest)) @ seen.mT + rest * (within.mT @ within)
    return span @ eigenbasis(total, label)


def _of_all(sides: Sequence[Side], size: int, label: str) -> Tensor:
    """Return all eigenvectors of the sum."""
    like = sides[0].weights
    total = like.new_zeros(len(like), size, size)
    for side in sides:
        if side.basis is None:
            total += torch.diag_embed(side.weights)
            continue
        kept = side.weights[:, None, : side.rank]
        if side.is_thin:
            rest = side.weights[:, -1:]
            total.diagonal(dim1=1, dim2=2)[:, : side.size] += rest
            kept = kept - rest[:, None]
        total += (side.basis * kept) @ side.basis.mT
    # What is alone in its row would be mixed with all that has the same value.
    diagonal = torch.diag_embed(total.diagonal(dim1=1, dim2=2))
    rest_of_rows = (total - diagonal).ne(0).any(dim=0)
    together = (rest_of_rows.any(dim=0) | rest_of_rows.any(dim=1)).nonzero().flatten()
    basis = torch.eye(size, dtype=like.dtype, device=like.device).repeat(len(like), 1, 1)
    if len(together):
        found = eigenbasis(total[:, together[:, None], together], label)
        basis[:, together[:, None], together] = found
    return basis
