"""Pure functions on tensors: covariances, eigenvalues, rotations, merging.

One layout throughout. Data are `[groups, batch, shared, features]`: `groups` counts independent
blocks of one parameter (the groups of a convolution, otherwise 1), `shared` the positions that
share the parameter. Matrices are `[groups, d_out, d_in]`. A basis `[groups, d, rank]` holds
orthonormal columns; None stands for the identity, which is never stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from opt_einsum import contract
from torch import Tensor

from rotate_ewc._utils.numerics import full_precision
from rotate_ewc.linalg.eigh import eigenbasis

Basis = Tensor | None

# Symmetric products are computed by panels, above the diagonal only: narrower ones save more, but
# products of less than about this width are slow.
_NARROWEST_PANEL: Final = 96
_MOST_PANELS: Final = 4


@full_precision
def add_covariance_(total: Tensor, vectors: Tensor) -> None:
    """Add the outer products of vectors to a symmetric sum, of which the upper triangle counts.

    Args:
        total: `[groups, d, d]`, changed in place. What is below the diagonal is meaningless.
        vectors: `[groups, batch, shared, d]`.
    """
    groups, _, shared, size = vectors.shape
    if vectors.stride(3) != 1 and shared >= size:
        # Positions lie together (as pixels do), and multiplying them as they are is cheaper.
        total.add_((vectors.mT @ vectors).sum(dim=1))
        return
    rows = vectors.flatten(1, 2)
    panels = min(_MOST_PANELS, size // _NARROWEST_PANEL)
    if groups > 1 or panels < 2:
        total.baddbmm_(rows.mT, rows)
        return
    width = -(-size // panels)
    for start in range(0, size, width):
        panel = total[0, start : start + width, start:]
        left = rows[0, :, start : start + width]
        panel.addmm_(left.mT, rows[0, :, start:])


@full_precision
def rotate(vectors: Tensor, basis: Basis) -> Tensor:
    """Express vectors `[groups, batch, shared, d]` in a basis → `[groups, batch, shared, rank]`."""
    if basis is None:
        return vectors
    if vectors.stride(3) != 1 and vectors.shape[2] > 1:
        # Positions lie together (as pixels do), and stay so: a copy costs more.
        return (basis.mT[:, None] @ vectors.mT).mT
    rotated = vectors.flatten(1, 2) @ basis
    return rotated.view(*vectors.shape[:3], basis.shape[2])


@full_precision
def squared_entries(gradients: Tensor, gradient_basis: Basis, activation_basis: Basis) -> Tensor:
    """Sum over examples the squared entries of `Q_gᵀ G_n Q_a`.

    Args:
        gradients: Per-example gradients, `[groups, n, d_out, d_in]`.
        gradient_basis: Q_g, `[groups, d_out, d_out]` or None.
        activation_basis: Q_a, `[groups, d_in, d_in]` or None.

    Returns:
        `[groups, d_out, d_in]`.
    """
    rotated = gradients
    if activation_basis is not None:
        # All examples in one product.
        rotated = (rotated.flatten(1, 2) @ activation_basis).view_as(rotated)
    if gradient_basis is not None and rotated.shape[3] == 1:
        rotated = (rotated.squeeze(3) @ gradient_basis).unsqueeze(3)
    elif gradient_basis is not None:
        rotated = gradient_basis.mT[:, None] @ rotated
    return rotated.square().sum(dim=1)


@full_precision
def squared_lookups(gradients: Tensor, indices: Tensor, vocabulary: int) -> Tensor:
    """Sum over examples the squared entries of gradients of rows looked up.

    `Λ_vj = Σ_n (Σ_{s: k_ns = v} g_nsj)²`: what one example adds to a row is summed before it is
    squared, without a vocabulary-sized tensor for each example.

    Args:
        gradients: `[n, shared, d]`.
        indices: k, `[n, shared]`; negative ones count nothing.
        vocabulary: Number of rows.

    Returns:
        `[vocabulary, d]`.
    """
    kept = (indices >= 0).flatten()
    example = torch.arange(len(indices), device=indices.device)[:, None]
    rows = (example * vocabulary + indices).flatten()[kept]
    distinct, place = torch.unique(rows, return_inverse=True)
    sums = gradients.new_zeros(len(distinct), gradients.shape[2])
    sums.index_add_(0, place, gradients.flatten(0, 1)[kept])
    total = gradients.new_zeros(vocabulary, gradients.shape[2])
    return total.index_add_(0, distinct % vocabulary, sums.square_())


def scatter_rows(gradients: Tensor, indices: Tensor, vocabulary: int) -> Tensor:
    """Add gradients `[n, shared, d]` to the rows looked up → `[n, vocabulary, d]`.

    Negative indices count nothing.
    """
    examples, features = len(indices), gradients.shape[2]
    kept = (indices >= 0).flatten()
    rows = (torch.arange(examples, device=indices.device)[:, None] * vocabulary + indices).flatten()
    total = gradients.new_zeros(examples * vocabulary, features)
    total.index_add_(0, rows[kept], gradients.flatten(0, 1)[kept])
    return total.view(examples, vocabulary, features)


@full_precision
def to_eigenbasis(matrix: Tensor, gradient_basis: Basis, activation_basis: Basis) -> Tensor:
    """Return `Q_gᵀ D Q_a` for one matrix D `[groups, d_out, d_in]` or for K, `[K, groups, …]`."""
    rotated = matrix if gradient_basis is None else _from_left(gradient_basis.mT, matrix)
    return rotated if activation_basis is None else _from_right(rotated, activation_basis)


@full_precision
def from_eigenbasis(matrix: Tensor, gradient_basis: Basis, activation_basis: Basis) -> Tensor:
    """Return `Q_g D Q_aᵀ` for one matrix D `[groups, rank_out, rank_in]` or for K of them."""
    rotated = matrix if gradient_basis is None else _from_left(gradient_basis, matrix)
    return rotated if activation_basis is None else _from_right(rotated, activation_basis.mT)


def _from_left(factor: Tensor, matrix: Tensor) -> Tensor:
    """Return `factor @ matrix`, for K matrices in one product: K narrow ones take far longer."""
    if matrix.ndim == 3:
        return factor @ matrix
    count, groups, rows, columns = matrix.shape
    side_by_side = matrix.movedim(0, 2).reshape(groups, rows, count * columns)
    return (factor @ side_by_side).view(groups, factor.shape[1], count, columns).movedim(2, 0)


def _from_right(matrix: Tensor, factor: Tensor) -> Tensor:
    """Return `matrix @ factor`, for K matrices in one product."""
    if matrix.ndim == 3:
        return matrix @ factor
    count, groups, rows, columns = matrix.shape
    stacked = matrix.movedim(0, 1).reshape(groups, count * rows, columns)
    return (stacked @ factor).view(groups, count, rows, factor.shape[2]).movedim(1, 0)


@full_precision
def merged_basis(
    bases: Sequence[Basis], weights: Sequence[Tensor], label: str = "merged factor"
) -> Basis:
    """Return the eigenbasis of a sum of partial traces, `Σ_t Q_t diag(w_t) Q_tᵀ`.

    Args:
        bases: One `[groups, d, rank_t]` for each operator; None is the identity.
        weights: `[groups, rank_t]`: the operators' eigenvalues summed over the other side.
        label: What to call the sum in messages.

    Returns:
        `[groups, d, d]`, or None where every basis is the identity.
    """
    present = [basis for basis in bases if basis is not None]
    if not present:
        return None
    size = present[0].shape[1]
    partial_trace = weights[0].new_zeros(weights[0].shape[0], size, size)
    for basis, weight in zip(bases, weights, strict=True):
        if basis is None:
            partial_trace += torch.diag_embed(weight)
        else:
            partial_trace += (basis * weight[:, None, :]) @ basis.mT
    return eigenbasis(partial_trace, label)


@full_precision
def change_basis(basis: Basis, new_basis: Basis) -> Basis:
    """Return `Uᵀ Q`, the coordinates of an old basis Q in a new basis U; None where both are I."""
    if new_basis is None:
        return basis
    return new_basis.mT if basis is None else new_basis.mT @ basis


@full_precision
def project_eigenvalues(
    gradient_change: Basis, activation_change: Basis, eigenvalues: Tensor
) -> Tensor:
    """Return the diagonal of an operator in another basis: `(U_gᵀQ_g)^∘2 Λ ((U_aᵀQ_a)^∘2)ᵀ`.

    Args:
        gradient_change: `U_gᵀ Q_g`, `[groups, d_out, rank_out]`; None where it is the identity.
        activation_change: `U_aᵀ Q_a`, `[groups, d_in, rank_in]`; None likewise.
        eigenvalues: Λ, `[groups, rank_out, rank_in]`.

    Returns:
        `[groups, d_out, d_in]`.
    """
    if gradient_change is not None and activation_change is not None:
        projected: Tensor = contract(
            "gop,gpq,giq->goi", gradient_change.square(), eigenvalues, activation_change.square()
        )
        return projected
    if gradient_change is not None:
        return gradient_change.square() @ eigenvalues
    if activation_change is not None:
        return eigenvalues @ activation_change.square().mT
    return eigenvalues
