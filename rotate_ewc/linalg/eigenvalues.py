"""Eigenvalues: squared entries of per-example gradients in a basis, in the cheapest way.

    Λ_ij = Σ_n Σ_v ((Q_gᵀ G_nv Q_a)_ij)²,    G_nv = Σ_s g_nvs a_nsᵀ

for examples n, output vectors v and shared positions s (George et al. 2018, "Fast Approximate
Natural Gradient Descent in a Kronecker-factored Eigenbasis"; here with per-example gradients that
sum over shared positions). Rotating G gives the same as rotating its factors g and a, so there are
several ways to compute these numbers. The shapes decide which is cheapest: see `cheapest_route`.

Data are `[groups, batch, shared, features]`, as in `rotate_ewc.linalg.kronecker`. All functions
compute in the dtypes of their arguments: call them outside of `torch.autocast`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from itertools import product
from math import comb
from typing import Final

import torch
from torch import Tensor

from rotate_ewc.linalg.kronecker import Basis

# Floating-point operations that a large product does in the time one element takes to be written
# to memory and read back. With this value the faster kernel was chosen in 26 of 28 measured cases
# (2 to 16 positions, 64 × 288 to 512 × 512 entries, two cores), and a near tie in the others.
OPERATIONS_PER_ELEMENT: Final = 20.0

# On a CPU, data outside the cache are slow, and a large tensor that is freed goes back to the
# operating system, whose fresh pages cost several times what filling them does (a CNN took 3.7,
# 3.3, 3.1, 3.1, 3.2 s with 2, 4, 8, 16, 32 MiB). Accelerators want more work at a time.
_CHUNK_BYTES_CPU: Final = 2**23
_CHUNK_BYTES_OTHER: Final = 2**26


def chunk_bytes(device: torch.device) -> int:
    """Return how many bytes one intermediate tensor may take without loss of speed."""
    return _CHUNK_BYTES_CPU if device.type == "cpu" else _CHUNK_BYTES_OTHER


class Kernel(Enum):
    """Three equivalent ways to compute squared entries from g and a."""

    SINGLE = "one position: products of squares"
    PAIRS = "few positions: products over pairs of positions"
    EXAMPLES = "many positions: per-example gradients"


@dataclass(frozen=True)
class Route:
    """One way to compute the eigenvalues.

    Attributes:
        kernel: How squares are computed.
        rotate_activations: Whether a is rotated; if not, the per-example gradients are.
        rotate_gradients: Whether g is rotated; if not, the per-example gradients are.
    """

    kernel: Kernel
    rotate_activations: bool = True
    rotate_gradients: bool = True


def cheapest_route(shared: int, d_out: int, d_in: int, num_vectors: int) -> Route:
    """Choose the route with the lowest cost for one example and `num_vectors` output vectors.

    Rotating a costs `2 S d_in²` once for all output vectors, and rotating g `2 S d_out²` for each.
    Rotating the per-example gradient instead costs `2 d_out d_in²` and `2 d_out² d_in` for each.
    Computing this gradient costs `2 S d_out d_in`, and expanding the square over pairs of positions
    `S (S + 1) d_out d_in`. Memory traffic is counted too.

    Args:
        shared: S, the number of shared positions.
        d_out: Size of the output side.
        d_in: Size of the input side.
        num_vectors: Number of output vectors.
    """
    if shared == 1:
        return Route(Kernel.SINGLE)
    entries, moved = d_out * d_in, OPERATIONS_PER_ELEMENT
    of_activations = 2 * shared * d_in**2 / num_vectors
    of_gradients = 2 * shared * d_out**2
    pairs = comb(shared + 1, 2)
    costs = {
        Route(Kernel.PAIRS): of_activations
        + of_gradients
        + pairs * (2 * entries + moved * (d_out + d_in))
    }
    for activations, gradients in product((True, False), repeat=2):
        costs[Route(Kernel.EXAMPLES, activations, gradients)] = (
            entries * (2 * shared + moved)
            + (of_activations if activations else entries * (2 * d_in + moved))
            + (of_gradients if gradients else entries * (2 * d_out + moved))
        )
    return min(costs, key=costs.__getitem__)


def rotate(vectors: Tensor, basis: Basis) -> Tensor:
    """Express vectors `[groups, batch, shared, d]` in a basis → `[groups, batch, shared, rank]`."""
    if basis is None:
        return vectors
    if vectors.stride(3) != 1 and vectors.shape[2] > 1:
        # Positions are adjacent in memory, as pixels are, and stay so: copying would cost more.
        return (basis.mT[:, None] @ vectors.mT).mT
    rotated = vectors.flatten(1, 2) @ basis
    return rotated.view(*vectors.shape[:3], basis.shape[2])


def squared_projections(
    gradients: Iterable[Tensor],
    activations: Tensor,
    gradient_basis: Basis,
    activation_basis: Basis,
    route: Route,
    max_bytes: int | None = None,
) -> Tensor:
    """Sum the squared entries of rotated per-example gradients over examples and output vectors.

    Args:
        gradients: The output gradients of every output vector, `[groups, batch, shared, d_out]`;
            there is at least one.
        activations: Layer inputs, `[groups, batch, shared, d_in]`.
        gradient_basis: Q_g, `[groups, d_out, d_out]`; None is the identity.
        activation_basis: Q_a, `[groups, d_in, d_in]`; None is the identity.
        route: How to compute it.
        max_bytes: Bytes that the work on one chunk of examples may take (or on one example, if that
            needs more); never more than `chunk_bytes`.

    Returns:
        `[groups, d_out, d_in]`.
    """
    if route.rotate_activations:
        activations, activation_basis = rotate(activations, activation_basis), None
    if route.kernel is Kernel.SINGLE:
        squares = squared_rotations(gradients, gradient_basis)
        return single_position_product(squares, activations.square())

    def of_vector(g: Tensor) -> Tensor:
        rest = gradient_basis
        if route.rotate_gradients:
            g, rest = rotate(g, gradient_basis), None
        if route.kernel is Kernel.PAIRS:
            return pair_products(g, activations, max_bytes)
        return example_products(g, activations, rest, activation_basis, max_bytes)

    squares_of_vectors = map(of_vector, gradients)
    total = next(squares_of_vectors)
    for squares in squares_of_vectors:
        total.add_(squares)
    return total


def squared_rotations(gradients: Iterable[Tensor], basis: Basis) -> Tensor:
    """Rotate the gradients of all output vectors, and sum their squares.

    Args:
        gradients: `[groups, batch, shared, d_out]` for every output vector; there is at least one.
        basis: Q_g, or None.

    Returns:
        `[groups, batch, shared, d_out]`.
    """
    rotations = (rotate(g, basis) for g in gradients)
    total = next(rotations).square()
    for rotated in rotations:
        total.addcmul_(rotated, rotated)
    return total


def single_position_product(gradient_squares: Tensor, activation_squares: Tensor) -> Tensor:
    """Return `(g²)ᵀ (a²)`: with one shared position, no per-example gradient is needed."""
    return gradient_squares[:, :, 0].mT @ activation_squares[:, :, 0]


def pair_products(gradients: Tensor, activations: Tensor, max_bytes: int | None = None) -> Tensor:
    """Expand the square, `Σ_{s,t} (g_si g_ti) (a_sj a_tj)`: one product over pairs s ≤ t."""
    shared = gradients.shape[2]
    first, second = torch.triu_indices(shared, shared, device=gradients.device)
    multiplicity = (2.0 - (first == second).to(gradients.dtype))[:, None]
    pair_elements = len(first) * (gradients.shape[3] + activations.shape[3]) * gradients.shape[0]
    total = gradients.new_zeros(gradients.shape[0], gradients.shape[3], activations.shape[3])
    size = examples_at_once(gradients, 2 * pair_elements, max_bytes)

    def of_pairs(vectors: Tensor) -> Tensor:
        return vectors[:, :, first].mul_(vectors[:, :, second])

    for g, a in _chunks(gradients, activations, size):
        # Without names, so that they are freed before the next chunk needs memory.
        total.baddbmm_(of_pairs(g).mul_(multiplicity).flatten(1, 2).mT, of_pairs(a).flatten(1, 2))
    return total


def example_products(
    gradients: Tensor,
    activations: Tensor,
    gradient_basis: Basis = None,
    activation_basis: Basis = None,
    max_bytes: int | None = None,
) -> Tensor:
    """Compute per-example gradients, rotate the sides that still need it, and square them.

    All chunks use the same memory, because allocating it again would cost more than the work.
    """
    groups, d_out, d_in = gradients.shape[0], gradients.shape[3], activations.shape[3]
    rotated = gradient_basis is not None or activation_basis is not None
    entries, spaces = groups * d_out * d_in, 1 + rotated
    size = min(examples_at_once(gradients, spaces * entries, max_bytes), gradients.shape[1])
    memory = gradients.new_empty(spaces, size * entries)
    total = gradients.new_zeros(groups, d_out, d_in)
    for g, a in _chunks(gradients, activations, size):
        count = g.shape[1]
        by_example, by_row = (groups * count, d_out, d_in), (groups, count * d_out, d_in)
        work, *spare = (space[: count * entries] for space in memory)
        torch.bmm(g.mT.flatten(0, 1), a.flatten(0, 1), out=work.view(by_example))
        if activation_basis is not None:
            torch.bmm(work.view(by_row), activation_basis, out=spare[0].view(by_row))
            work, spare[0] = spare[0], work
        if gradient_basis is not None:
            left = gradient_basis.mT[:, None].expand(-1, count, -1, -1).flatten(0, 1)
            torch.bmm(left, work.view(by_example), out=spare[0].view(by_example))
            work = spare[0]
        total += work.square_().view(groups, count, d_out, d_in).sum(dim=1)
    return total


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


def squared_lookups(gradients: Tensor, indices: Tensor, vocabulary: int) -> Tensor:
    """Sum over examples the squared entries of the gradients of looked-up rows.

    `Λ_vj = Σ_n (Σ_{s: k_ns = v} g_nsj)²`: all that one example adds to a row is summed before it is
    squared. No example needs a tensor of the size of the vocabulary.

    Args:
        gradients: `[n, shared, d]`.
        indices: k, `[n, shared]`; negative ones are ignored.
        vocabulary: Number of rows.

    Returns:
        `[vocabulary, d]`.
    """
    sums, rows = summed_by_row(gradients, indices, vocabulary)
    total = gradients.new_zeros(vocabulary, gradients.shape[2])
    return total.index_add_(0, rows, sums.square_())


def summed_by_row(gradients: Tensor, indices: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Sum the gradients that each example adds to each row that it looks up.

    Args:
        gradients: `[n, shared, d]`.
        indices: `[n, shared]`; negative ones are ignored.
        vocabulary: Number of rows.

    Returns:
        A sum for each pair of an example and a row that it looks up, `[m, d]`, and these rows,
        `[m]`.
    """
    kept = (indices >= 0).flatten()
    example = torch.arange(len(indices), device=indices.device)[:, None]
    rows = (example * vocabulary + indices).flatten()[kept]
    distinct, place = torch.unique(rows, return_inverse=True)
    sums = gradients.new_zeros(len(distinct), gradients.shape[2])
    sums.index_add_(0, place, gradients.flatten(0, 1)[kept])
    return sums, distinct % vocabulary


def examples_at_once(like: Tensor, elements_per_example: int, max_bytes: int | None) -> int:
    """Return how many examples to process at a time, at least one.

    Args:
        like: A tensor with the dtype and the device of the work.
        elements_per_example: Number of elements that one example needs.
        max_bytes: Bytes that may be used; None is no limit. `chunk_bytes` limits them too.
    """
    most = chunk_bytes(like.device)
    most = most if max_bytes is None else min(most, max_bytes)
    return max(1, most // max(1, elements_per_example * like.element_size()))


def _chunks(gradients: Tensor, activations: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Split both along the batch."""
    yield from zip(
        torch.split(gradients, size, dim=1), torch.split(activations, size, dim=1), strict=True
    )
