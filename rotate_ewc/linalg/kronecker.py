"""Rotations into and out of a Kronecker-factored eigenbasis, and the arithmetic of merging.

One layout throughout. Data are `[groups, batch, shared, features]`: `groups` counts independent
blocks of one parameter (the groups of a convolution, otherwise 1), `shared` the positions that
share the parameter. Matrices are `[groups, d_out, d_in]`. A basis `[groups, d, rank]` holds
orthonormal columns; None stands for the identity, which is never stored.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from opt_einsum import contract
from torch import Tensor

from rotate_ewc._utils.numerics import full_precision
from rotate_ewc.linalg.eigh import eigenbasis

Basis = Tensor | None


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
