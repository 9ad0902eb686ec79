"""Pure functions on tensors: covariances, eigenbases, eigenvalues, rotations, merging.

One layout throughout. Data are `[groups, batch, shared, features]`: `groups` counts independent
blocks of one parameter (the groups of a convolution, otherwise 1), `shared` the positions that
share the parameter. Matrices are `[groups, d_out, d_in]`. A basis `[groups, d, rank]` holds
orthonormal columns; None stands for the identity, which is never stored.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from einops import einsum
from opt_einsum import contract
from torch import Tensor

from rotate_ewc.nested import tensors_in

Basis = Tensor | None
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

# Floating-point operations that a large product does in the time one element takes to be written
# to memory and read back. With this value the faster kernel was chosen in 26 of 28 measured cases
# (2 to 16 positions, 64 × 288 to 512 × 512 entries, two cores), and a near tie in the others.
_OPERATIONS_PER_ELEMENT = 20.0

_CHUNK_BYTES = 2**25


def full_precision(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Make a function compute in its arguments' own dtype, also inside `torch.autocast`."""

    @wraps(function)
    def wrapped(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        first = next(tensors_in((args, kwargs)), None)
        if first is None or not torch.is_autocast_enabled(first.device.type):
            return function(*args, **kwargs)
        with torch.autocast(first.device.type, enabled=False):
            return function(*args, **kwargs)

    return wrapped


@full_precision
def covariance_sum(vectors: Tensor) -> Tensor:
    """Sum the outer products of vectors `[groups, batch, shared, d]` → `[groups, d, d]`."""
    rows = vectors.flatten(1, 2)
    return rows.mT @ rows


def eigenbasis(covariance: Tensor) -> Tensor:
    """Return the eigenvectors of symmetric matrices, in ascending order of eigenvalue.

    Args:
        covariance: `[groups, d, d]`; only its symmetric part is used.

    Returns:
        Orthonormal columns `[groups, d, d]`, computed in float64 where float32 fails to converge.
    """
    symmetric = (covariance + covariance.mT) / 2
    try:
        basis: Tensor = torch.linalg.eigh(symmetric)[1]
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        warnings.warn(
            f"eigh of a {covariance.shape[1]} × {covariance.shape[2]} factor did not converge in "
            f"{covariance.dtype}; computing it in float64",
            RuntimeWarning,
            stacklevel=2,
        )
        basis = torch.linalg.eigh(symmetric.double())[1].to(covariance.dtype)
    return basis


@full_precision
def rotate(vectors: Tensor, basis: Basis) -> Tensor:
    """Express vectors `[groups, batch, shared, d]` in a basis → `[groups, batch, shared, rank]`."""
    if basis is None:
        return vectors
    rotated = vectors.flatten(1, 2) @ basis
    return rotated.view(*vectors.shape[:3], basis.shape[2])


def squared_projections(gradients: Tensor, activations: Tensor) -> Tensor:
    """Sum over examples the squared entries of per-example gradients.

    `Λ_ij = Σ_n (Σ_s g_nsi a_nsj)²` (George et al. 2018, "Fast Approximate Natural Gradient Descent
    in a Kronecker-factored Eigenbasis"; here with per-example gradients that sum over shared
    positions). Three equivalent ways, of which the cheapest is taken:

    * one position: `(g²)ᵀ (a²)`, one product, no per-example gradient;
    * few positions: the square written out, `Σ_{s,t} (g_si g_ti) (a_sj a_tj)`, one product over
      examples and pairs of positions;
    * many positions: per-example gradients, in chunks of bounded memory.

    Args:
        gradients: Output gradients in their basis, `[groups, batch, shared, d_out]`.
        activations: Layer inputs in their basis, `[groups, batch, shared, d_in]`.

    Returns:
        `[groups, d_out, d_in]`.
    """
    shared, d_out, d_in = gradients.shape[2], gradients.shape[3], activations.shape[3]
    if shared == 1:
        return single_position_product(gradients.square(), activations.square())
    pairs = shared * (shared + 1) // 2
    entries, vectors = d_out * d_in, d_out + d_in
    pair_cost = pairs * (2 * entries + _OPERATIONS_PER_ELEMENT * vectors)
    example_cost = entries * (2 * shared + _OPERATIONS_PER_ELEMENT)
    if pair_cost < example_cost:
        return squared_projections_pairs(gradients, activations)
    return squared_projections_per_example(gradients, activations)


@full_precision
def single_position_product(gradient_squares: Tensor, activation_squares: Tensor) -> Tensor:
    """`squared_projections` for one shared position, from squares: `(g²)ᵀ (a²)`."""
    return gradient_squares.flatten(1, 2).mT @ activation_squares.flatten(1, 2)


@full_precision
def squared_projections_pairs(gradients: Tensor, activations: Tensor) -> Tensor:
    """`squared_projections` through products over pairs of positions s ≤ t."""
    shared = gradients.shape[2]
    first, second = torch.triu_indices(shared, shared, device=gradients.device)
    multiplicity = (2.0 - (first == second).to(gradients.dtype))[:, None]
    pair_elements = len(first) * (gradients.shape[3] + activations.shape[3]) * gradients.shape[0]
    total = gradients.new_zeros(gradients.shape[0], gradients.shape[3], activations.shape[3])
    for g, a in _chunks(gradients, activations, pair_elements):
        g_pairs = (g[:, :, first] * g[:, :, second] * multiplicity).flatten(1, 2)
        a_pairs = (a[:, :, first] * a[:, :, second]).flatten(1, 2)
        total.baddbmm_(g_pairs.mT, a_pairs)
    return total


@full_precision
def squared_projections_per_example(gradients: Tensor, activations: Tensor) -> Tensor:
    """`squared_projections` through per-example gradients."""
    example_elements = gradients.shape[0] * gradients.shape[3] * activations.shape[3]
    total = gradients.new_zeros(gradients.shape[0], gradients.shape[3], activations.shape[3])
    for g, a in _chunks(gradients, activations, example_elements):
        total += (g.mT @ a).square_().sum(dim=1)
    return total


@full_precision
def to_eigenbasis(matrix: Tensor, gradient_basis: Basis, activation_basis: Basis) -> Tensor:
    """Return `Q_gᵀ D Q_a` for matrices D `[groups, d_out, d_in]`."""
    rotated = matrix if gradient_basis is None else gradient_basis.mT @ matrix
    return rotated if activation_basis is None else rotated @ activation_basis


@full_precision
def from_eigenbasis(matrix: Tensor, gradient_basis: Basis, activation_basis: Basis) -> Tensor:
    """Return `Q_g D Q_aᵀ` for matrices D `[groups, rank_out, rank_in]`."""
    rotated = matrix if gradient_basis is None else gradient_basis @ matrix
    return rotated if activation_basis is None else rotated @ activation_basis.mT


@full_precision
def apply_in_eigenbasis(
    columns: Tensor, gradient_basis: Basis, activation_basis: Basis, values: Tensor
) -> Tensor:
    """Multiply K matrices at once: `Q_g (Λ ∘ (Q_gᵀ D Q_a)) Q_aᵀ`.

    Args:
        columns: `[K, groups, d_out, d_in]`.
        gradient_basis: `[groups, d_out, d_out]` or None.
        activation_basis: `[groups, d_in, d_in]` or None.
        values: Λ, `[groups, d_out, d_in]`.

    Returns:
        `[K, groups, d_out, d_in]`.
    """
    rotated = columns
    if gradient_basis is not None:
        rotated = einsum(rotated, gradient_basis, "k g o i, g o p -> k g p i")
    if activation_basis is not None:
        rotated = einsum(rotated, activation_basis, "k g p i, g i q -> k g p q")
    rotated = rotated * values
    if activation_basis is not None:
        rotated = einsum(rotated, activation_basis, "k g p q, g i q -> k g p i")
    if gradient_basis is not None:
        rotated = einsum(rotated, gradient_basis, "k g p i, g o p -> k g o i")
    return rotated


@full_precision
def merged_basis(bases: Sequence[Basis], weights: Sequence[Tensor]) -> Basis:
    """Return the eigenbasis of a sum of partial traces, `Σ_t Q_t diag(w_t) Q_tᵀ`.

    Args:
        bases: One `[groups, d, rank_t]` for each operator; None is the identity.
        weights: `[groups, rank_t]`: the operators' eigenvalues summed over the other side.

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
    return eigenbasis(partial_trace)


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


def _chunks(
    gradients: Tensor, activations: Tensor, elements_per_example: int
) -> Sequence[tuple[Tensor, Tensor]]:
    """Cut both along the batch so that the work on a chunk stays within `_CHUNK_BYTES`."""
    bytes_per_example = max(1, elements_per_example * gradients.element_size())
    size = max(1, _CHUNK_BYTES // bytes_per_example)
    return list(
        zip(torch.split(gradients, size, dim=1), torch.split(activations, size, dim=1), strict=True)
    )
