"""Eigenvalues in thin bases: squares in the kept directions, and sums over their complements.

A thin basis has k of d orthonormal columns. The results are

    Σ_n ((Q_gᵀ G_n Q_a)_ij)²

in kept rows and columns, as in `rotate_ewc.linalg.eigenvalues`. One more row and one more column at
the end hold the sums over all other rows and columns. They need no basis of the complement, because
a rotation preserves norms: for a kept row i, the sum is `Σ_n ‖u_iᵀ G_n‖²` minus the kept entries of
the row, and in the corner it is `Σ_n ‖G_n‖²` minus all other entries.

A side that is not thin has a square basis or none, and all of its rows. All functions compute in
the dtypes of their arguments: call them outside of `torch.autocast`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from math import comb

import torch
from torch import Tensor

from rotate_ewc.linalg.eigenvalues import (
    OPERATIONS_PER_ELEMENT,
    example_products,
    examples_at_once,
    rotate,
    single_position_product,
    squared_rotations,
    summed_by_row,
)
from rotate_ewc.linalg.kronecker import Basis


class ThinRoute(Enum):
    """Four equivalent ways to compute squares and their sums from g and a."""

    SINGLE = "one position: products of squares"
    PAIRS = "few positions: products over pairs of positions"
    GRAMS = "fewer positions than entries: kept per-example gradients, and products of positions"
    EXAMPLES = "many positions: whole per-example gradients"


@dataclass(frozen=True)
class Side:
    """The vectors of one side of some examples, expressed in a basis.

    Attributes:
        kept: The vectors in the basis, `[groups, n, shared, k]`.
        rest: The inner products of their remainders outside the basis, `[groups, n, shared,
            shared]`; None if the basis is not thin.
    """

    kept: Tensor
    rest: Tensor | None

    @classmethod
    def of(cls, vectors: Tensor, basis: Basis) -> Side:
        """Rotate vectors `[groups, n, shared, d]`."""
        kept = rotate(vectors, basis)
        if not is_thin(basis):
            return cls(kept, None)
        return cls(kept, vectors @ vectors.mT - kept @ kept.mT)

    @property
    def rows(self) -> int:
        """K: the number of kept directions, and one more if there are others."""
        return self.kept.shape[3] + (self.rest is not None)

    def split(self, size: int) -> Iterator[Side]:
        """Split the examples into chunks."""
        kept = torch.split(self.kept, size, dim=1)
        rest = [None] * len(kept) if self.rest is None else torch.split(self.rest, size, dim=1)
        yield from map(Side, kept, rest)

    def pairs(self, first: Tensor, second: Tensor) -> Tensor:
        """Return the products of entries at pairs of positions, `[groups, n, pairs, K]`."""
        products = self.kept[:, :, first].mul_(self.kept[:, :, second])
        if self.rest is not None:
            products = torch.cat([products, self.rest[:, :, first, second][..., None]], dim=3)
        return products

    def squares_with(self, other: Side) -> Tensor | None:
        """Return `Σ_n ‖r_iᵀ G_n‖²`, `[groups, k]`, within the complement of this side's basis.

        Args:
            other: The other side, with k kept directions r_i.
        """
        if self.rest is None:
            return None
        return ((self.rest @ other.kept) * other.kept).sum(dim=(1, 2))


def is_thin(basis: Basis) -> bool:
    """Whether a basis keeps fewer than all directions."""
    return basis is not None and basis.shape[2] < basis.shape[1]


def cheapest_thin_route(
    shared: int, sizes: tuple[int, int], ranks: tuple[int | None, int | None], num_vectors: int
) -> ThinRoute:
    """Choose the route with the lowest cost for one example and `num_vectors` output vectors.

    Costs are counted as in `rotate_ewc.linalg.eigenvalues.cheapest_route`: a is rotated, and its
    inner products are computed, once for all output vectors. Memory traffic is counted too.

    Args:
        shared: S, the number of shared positions.
        sizes: `(d_out, d_in)`.
        ranks: How many directions of each side are kept; None if it has no basis.
        num_vectors: Number of output vectors.
    """
    if shared == 1:
        return ThinRoute.SINGLE
    (d_out, d_in), moved = sizes, OPERATIONS_PER_ELEMENT
    k_out, k_in = (d if k is None else k for d, k in zip(sizes, ranks, strict=True))
    entries, pairs = d_out * d_in, comb(shared + 1, 2)
    to_sides, of_rest, rotated = 0.0, 0.0, entries * (2.0 * shared + moved)
    for d, k, rank, times, other in (
        (d_out, k_out, ranks[0], 1.0, k_in),
        (d_in, k_in, ranks[1], 1.0 / num_vectors, k_out),
    ):
        if rank is None:
            continue
        to_sides += 2 * shared * d * k * times
        rotated += 2 * entries * k if k < d else min(2 * shared * d * k * times, 2 * entries * d)
        if k < d:
            to_sides += shared**2 * (2 * (d + k) + moved) * times
            of_rest += 2 * shared**2 * other + moved * shared * other
    costs = {
        ThinRoute.PAIRS: to_sides + pairs * (2 * k_out * k_in + moved * (k_out + k_in)),
        ThinRoute.GRAMS: to_sides + of_rest + k_out * k_in * (2 * shared + moved),
        ThinRoute.EXAMPLES: rotated,
    }
    return min(costs, key=costs.__getitem__)


def squared_with_rest(gradients: Iterable[Tensor], basis: Basis) -> Tensor:
    """Rotate the gradients of all output vectors, and sum their squares.

    Args:
        gradients: `[groups, batch, shared, d]` for every output vector; there is at least one.
        basis: A thin basis `[groups, d, k]`, or a square one, or None.

    Returns:
        `[groups, batch, shared, K]`.
    """
    if not is_thin(basis):
        return squared_rotations(gradients, basis)
    of_vectors = (_with_rest(vectors, rotate(vectors, basis).square()) for vectors in gradients)
    total = next(of_vectors)
    for squares in of_vectors:
        total.add_(squares)
    return total


def _with_rest(vectors: Tensor, squares: Tensor) -> Tensor:
    """Append the rest of each squared norm to the squares of the kept directions."""
    norms = torch.linalg.vector_norm(vectors, dim=3, keepdim=True).square()
    rest = (norms - squares.sum(dim=3, keepdim=True)).clamp_(min=0.0)
    return torch.cat([squares, rest], dim=3)


def summed_projections(
    gradients: Iterable[Tensor],
    activations: Tensor,
    gradient_basis: Basis,
    activation_basis: Basis,
    route: ThinRoute,
    max_bytes: int | None = None,
) -> Tensor:
    """Sum squares of rotated per-example gradients over examples and output vectors.

    Args:
        gradients: The output gradients of every output vector, `[groups, batch, shared, d_out]`;
            there is at least one.
        activations: Layer inputs, `[groups, batch, shared, d_in]`.
        gradient_basis: `[groups, d_out, k_out]`; None is the identity.
        activation_basis: `[groups, d_in, k_in]`; None is the identity.
        route: How to compute it.
        max_bytes: Bytes that the work on one chunk of examples may take (or on one example, if that
            needs more).

    Returns:
        `[groups, K_out, K_in]`.
    """
    if route is ThinRoute.SINGLE:
        squares = squared_with_rest(gradients, gradient_basis)
        return single_position_product(squares, squared_with_rest([activations], activation_basis))
    if route is ThinRoute.EXAMPLES:
        found = (
            _whole_examples(g, activations, gradient_basis, activation_basis, max_bytes)
            for g in gradients
        )
    else:
        inputs = Side.of(activations, activation_basis)
        product = _pair_products if route is ThinRoute.PAIRS else _gram_products
        found = (product(Side.of(g, gradient_basis), inputs, max_bytes) for g in gradients)
    total = next(found)
    for one in found:
        total.add_(one)
    # The difference of nearly equal numbers may be negative by rounding.
    return total.clamp_(min=0.0)


def summed_entries(gradients: Tensor, gradient_basis: Basis, activation_basis: Basis) -> Tensor:
    """Sum squares of rotated per-example gradients, given as whole matrices.

    Args:
        gradients: `[groups, n, d_out, d_in]`.
        gradient_basis: `[groups, d_out, k_out]`; None is the identity.
        activation_basis: `[groups, d_in, k_in]`; None is the identity.

    Returns:
        `[groups, K_out, K_in]`.
    """
    if gradient_basis is None:
        return _by_row(gradients, activation_basis)
    if gradients.shape[3] == 1:
        rotated = (gradients.squeeze(3) @ gradient_basis).unsqueeze(3)
    else:
        rotated = gradient_basis.mT[:, None] @ gradients
    kept = _by_row(rotated, activation_basis)
    if not is_thin(gradient_basis):
        return kept
    whole = _by_row(gradients, activation_basis).sum(dim=1, keepdim=True)
    rest = (whole - kept.sum(dim=1, keepdim=True)).clamp_(min=0.0)
    return torch.cat([kept, rest], dim=1)


def summed_lookups(gradients: Tensor, indices: Tensor, vocabulary: int, basis: Tensor) -> Tensor:
    """Sum squares of rotated gradients of looked-up rows.

    Like `rotate_ewc.linalg.eigenvalues.squared_lookups`, but the sum of all that an example adds to
    a row is rotated.

    Args:
        gradients: `[n, shared, d]`.
        indices: `[n, shared]`; negative ones are ignored.
        vocabulary: Number of rows.
        basis: A thin basis, `[1, d, k]`.

    Returns:
        `[vocabulary, k + 1]`.
    """
    sums, rows = summed_by_row(gradients, indices, vocabulary)
    squares = squared_with_rest([sums[None, :, None]], basis)[0, :, 0]
    total = gradients.new_zeros(vocabulary, squares.shape[1])
    return total.index_add_(0, rows, squares)


def thinned(squares: Tensor, rank: int, thinner: int, size: int) -> Tensor:
    """Keep only the last `thinner` of the kept directions, and add the others to the rest.

    Args:
        squares: `[groups, K, *]`: sums of squares. Each of the first `rank` rows is for one
            direction; one more row is for all others, if there are any.
        rank: How many directions are kept now.
        thinner: How many to keep, at most `rank`.
        size: How many directions there are in all.
    """
    if thinner == size:
        return squares
    first = rank - thinner
    rest = squares[:, :first].sum(dim=1, keepdim=True)
    if rank < size:
        rest = rest + squares[:, rank:]
    return torch.cat([squares[:, first:rank], rest], dim=1)


def _by_row(gradients: Tensor, basis: Basis) -> Tensor:
    """Sum over examples the squares of each row in a basis: `[groups, rows, K]`."""
    if basis is None:
        return gradients.square().sum(dim=1)
    groups, count, rows, _ = gradients.shape
    rotated = (gradients.flatten(1, 2) @ basis).view(groups, count, rows, -1)
    kept = rotated.square_().sum(dim=1)
    if not is_thin(basis):
        return kept
    norms = torch.linalg.vector_norm(gradients, dim=(1, 3)).square()[..., None]
    return torch.cat([kept, (norms - kept.sum(dim=2, keepdim=True)).clamp_(min=0.0)], dim=2)


def _whole_examples(
    gradients: Tensor,
    activations: Tensor,
    gradient_basis: Basis,
    activation_basis: Basis,
    max_bytes: int | None,
) -> Tensor:
    """Compute whole per-example gradients, after rotating by square bases if that is cheaper."""
    shared, d_out, d_in = gradients.shape[2], gradients.shape[3], activations.shape[3]
    if not is_thin(gradient_basis) and shared < d_in:
        gradients, gradient_basis = rotate(gradients, gradient_basis), None
    if not is_thin(activation_basis) and shared < d_out:
        activations, activation_basis = rotate(activations, activation_basis), None
    groups = gradients.shape[0]
    size = examples_at_once(gradients, 2 * groups * d_out * d_in, max_bytes)
    total = None
    parts = (torch.split(vectors, size, dim=1) for vectors in (gradients, activations))
    for g, a in zip(*parts, strict=True):
        part = summed_entries(g.mT @ a, gradient_basis, activation_basis)
        total = part if total is None else total.add_(part)
    if total is None:
        raise ValueError("there are no examples; expected at least one")
    return total


def _pair_products(gradients: Side, activations: Side, max_bytes: int | None) -> Tensor:
    """Expand the square over pairs of positions s ≤ t.

    The sum over the complement of a basis is `Σ_{s,t} r_st (a_sj a_tj)`, one more entry for each
    pair. Here `r_st` is the inner product of the remainders of the vectors at s and t.
    """
    shared = gradients.kept.shape[2]
    first, second = torch.triu_indices(shared, shared, device=gradients.kept.device)
    multiplicity = (2.0 - (first == second).to(gradients.kept.dtype))[:, None]
    groups = gradients.kept.shape[0]
    elements = 2 * len(first) * (gradients.rows + activations.rows) * groups
    size = examples_at_once(gradients.kept, elements, max_bytes)
    total = gradients.kept.new_zeros(groups, gradients.rows, activations.rows)
    for g, a in zip(gradients.split(size), activations.split(size), strict=True):
        weighted = g.pairs(first, second).mul_(multiplicity)
        total.baddbmm_(weighted.flatten(1, 2).mT, a.pairs(first, second).flatten(1, 2))
    return total


def _gram_products(gradients: Side, activations: Side, max_bytes: int | None) -> Tensor:
    """Compute per-example gradients in kept directions only; inner products give the rest."""
    kept = example_products(gradients.kept, activations.kept, max_bytes=max_bytes)
    groups, k_out, k_in = kept.shape
    total = kept.new_zeros(groups, gradients.rows, activations.rows)
    total[:, :k_out, :k_in] = kept
    column, row = activations.squares_with(gradients), gradients.squares_with(activations)
    if column is not None:
        total[:, :k_out, -1] = column
    if row is not None:
        total[:, -1, :k_in] = row
    if gradients.rest is not None and activations.rest is not None:
        total[:, -1, -1] = (gradients.rest * activations.rest).sum(dim=(1, 2, 3))
    return total
