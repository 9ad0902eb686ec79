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
from einops import einsum, rearrange
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


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which statistics of a model in some dtype are kept: float32 or better."""
    return torch.promote_types(dtype, torch.float32)


@full_precision
def covariance_sum(vectors: Tensor) -> Tensor:
    """Sum the outer products of vectors `[groups, batch, shared, d]` → `[groups, d, d]`."""
    rows = vectors.flatten(1, 2)
    return rows.mT @ rows


@full_precision
def output_partial_trace(gradients: Tensor) -> Tensor:
    """Sum `G_n G_nᵀ` over `[groups, n, d_out, d_in]` → `[groups, d_out, d_out]`."""
    columns = rearrange(gradients, "g n o i -> g o (n i)")
    return columns @ columns.mT


@full_precision
def input_partial_trace(gradients: Tensor) -> Tensor:
    """Sum `G_nᵀ G_n` over `[groups, n, d_out, d_in]` → `[groups, d_in, d_in]`."""
    rows = rearrange(gradients, "g n o i -> g (n o) i")
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


def squared_projections(
    gradients: Tensor, activations: Tensor, max_bytes: int = _CHUNK_BYTES
) -> Tensor:
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
        max_bytes: What the products of one chunk of examples may take (or of one example, if that
            takes more).

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
        return squared_projections_pairs(gradients, activations, max_bytes)
    return squared_projections_per_example(gradients, activations, max_bytes)


@full_precision
def single_position_product(gradient_squares: Tensor, activation_squares: Tensor) -> Tensor:
    """`squared_projections` for one shared position, from squares: `(g²)ᵀ (a²)`."""
    return gradient_squares.flatten(1, 2).mT @ activation_squares.flatten(1, 2)


@full_precision
def squared_projections_pairs(
    gradients: Tensor, activations: Tensor, max_bytes: int = _CHUNK_BYTES
) -> Tensor:
    """`squared_projections` through products over pairs of positions s ≤ t."""
    shared = gradients.shape[2]
    first, second = torch.triu_indices(shared, shared, device=gradients.device)
    multiplicity = (2.0 - (first == second).to(gradients.dtype))[:, None]
    pair_elements = len(first) * (gradients.shape[3] + activations.shape[3]) * gradients.shape[0]
    total = gradients.new_zeros(gradients.shape[0], gradients.shape[3], activations.shape[3])
    for g, a in _chunks(gradients, activations, 2 * pair_elements, max_bytes):
        g_pairs = g[:, :, first].mul_(g[:, :, second]).mul_(multiplicity).flatten(1, 2)
        a_pairs = a[:, :, first].mul_(a[:, :, second]).flatten(1, 2)
        total.baddbmm_(g_pairs.mT, a_pairs)
    return total


@full_precision
def squared_projections_per_example(
    gradients: Tensor, activations: Tensor, max_bytes: int = _CHUNK_BYTES
) -> Tensor:
    """`squared_projections` through per-example gradients."""
    example_elements = gradients.shape[0] * gradients.shape[3] * activations.shape[3]
    total = gradients.new_zeros(gradients.shape[0], gradients.shape[3], activations.shape[3])
    for g, a in _chunks(gradients, activations, example_elements, max_bytes):
        total += (g.mT @ a).square_().sum(dim=1)
    return total


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
        rotated = rotated @ activation_basis[:, None]
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
    gradients: Tensor, activations: Tensor, elements_per_example: int, max_bytes: int
) -> Sequence[tuple[Tensor, Tensor]]:
    """Cut both along the batch so that the work on a chunk stays within `max_bytes`.

    No more than `_CHUNK_BYTES` in any case: what leaves the processor's cache is slower.
    """
    bytes_per_example = max(1, elements_per_example * gradients.element_size())
    size = max(1, min(max_bytes, _CHUNK_BYTES) // bytes_per_example)
    return list(
        zip(torch.split(gradients, size, dim=1), torch.split(activations, size, dim=1), strict=True)
    )
