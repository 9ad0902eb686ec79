"""A thin basis, completed to an orthogonal matrix without storing one.

A thin basis U `[groups, d, k]` says nothing of its complement, in which every basis is as good as
any other. The cheapest one differs from the identity by rank k: a block reflector

    Q = I - V T Vᵀ,    T⁻¹ + T⁻ᵀ = VᵀV

(the compact WY form; Schreiber and Van Loan 1989) whose columns at k chosen positions are those of
U, up to their signs. Coordinates in Q therefore have the place of an entry each: the chosen
positions are the kept directions, and all others are directions of the complement.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rotate_ewc._utils.numerics import full_precision


@dataclass(frozen=True, eq=False)
class CompletedBasis:
    """An orthogonal matrix Q with the columns of a thin basis, up to signs, at some positions.

    Attributes:
        positions: Where the kept directions are among the coordinates, `[groups, k]`.
        matrix: Q itself, `[groups, d, d]`, where more than half of the directions are kept, so that
            it is the cheaper form; else None.
        reflector: V, `[groups, d, k]`; None where there is `matrix`.
        weighted: V T, of the same shape; None likewise.
    """

    positions: Tensor
    matrix: Tensor | None
    reflector: Tensor | None
    weighted: Tensor | None

    @property
    def rotation(self) -> Tensor | CompletedBasis:
        """What `rotate_ewc.linalg.kronecker` takes: the matrix where there is one."""
        return self if self.matrix is None else self.matrix

    def numbers(self, size: int) -> Tensor:
        """Return which kept direction each coordinate is, `[groups, d]`; k where it is none."""
        groups, rank = self.positions.shape
        found = self.positions.new_full((groups, size), rank)
        every = torch.arange(rank, device=found.device).expand(groups, -1)
        return found.scatter_(1, self.positions, every)

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """V and V T, where there is no `matrix`."""
        if self.reflector is None or self.weighted is None:
            raise RuntimeError("a basis of most directions has no reflector")
        return self.reflector, self.weighted


@full_precision
def complete(basis: Tensor) -> CompletedBasis:
    """Complete a thin basis.

    The positions are the rows that partial pivoting finds, those of large entries. A row of zeros,
    of an input or output that is never on, is none of them; there V is zero, so that the
    coordinate is the entry itself, to the bit.

    Args:
        basis: U `[groups, d, k]`, k less than d, orthonormal up to rounding.

    Returns:
        Q in the dtype of the basis, orthogonal up to a few units in the last place.
    """
    # A caller may be in inference mode, whose tensors cannot be used outside of it.
    with torch.inference_mode(False), torch.no_grad():
        _, size, rank = basis.shape
        doubled = basis.detach().double()
        order = _pivoted_rows(doubled)
        rows = order[:, :, None].expand(-1, -1, rank)
        # The R of an orthonormal matrix is diagonal, with entries ±1: the signs.
        packed, _ = torch.geqrf(doubled.gather(1, rows))
        ordered = packed.tril(-1)
        ordered.diagonal(dim1=1, dim2=2).fill_(1.0)
        # Not with the factors of LAPACK, which are 0 where nothing need be reflected: of the norms,
        # Q is orthogonal up to rounding whatever V is.
        gram = ordered.mT @ ordered
        inverse = gram.triu(1) + 0.5 * torch.diag_embed(gram.diagonal(dim1=1, dim2=2))
        reflector = torch.zeros_like(ordered).scatter_(1, rows, ordered)
        weighted = torch.linalg.solve_triangular(inverse, reflector, upper=True, left=False)
        positions = order[:, :rank].contiguous()
        if 2 * rank < size:
            return CompletedBasis(
                positions, None, reflector.to(basis.dtype), weighted.to(basis.dtype)
            )
        eye = torch.eye(size, dtype=doubled.dtype, device=basis.device)
        matrix = torch.baddbmm(eye, weighted, reflector.mT, alpha=-1)
        return CompletedBasis(positions, matrix.to(basis.dtype), None, None)


def _pivoted_rows(basis: Tensor) -> Tensor:
    """Return the rows `[groups, d]` in the order that partial pivoting brings them into."""
    groups, size, rank = basis.shape
    swaps = torch.linalg.lu_factor(basis).pivots.long().cpu() - 1
    order = torch.arange(size, device="cpu").repeat(groups, 1)
    every = torch.arange(groups, device="cpu")
    for step in range(rank):
        other = swaps[:, step]
        first = order[:, step].clone()
        order[:, step] = order[every, other]
        order[every, other] = first
    return order.to(basis.device)
