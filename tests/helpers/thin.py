"""Thin blocks, and their dense matrices of projections, written out in NumPy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rotate_ewc.linalg import kronecker
from rotate_ewc.linalg.block import Block
from rotate_ewc.linalg.completion import complete

Matrix = NDArray[np.float64]


def orthonormal(groups: int, size: int, rank: int, seed: int) -> Tensor:
    """Random orthonormal columns, `[groups, size, rank]` in float64."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(groups, size, rank, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(normal)[0].contiguous()


def thin_block(
    sizes: tuple[int, int, int],
    ranks: tuple[int | None, int | None],
    *,
    seed: int = 0,
    parameters: tuple[str, ...] = ("w",),
    transposed: bool = False,
) -> Block:
    """A block with random bases of some ranks (None is the identity), and random eigenvalues.

    A fifth of these are zero.
    """
    groups = sizes[0]
    bases, rows = [], []
    for side, (size, rank) in enumerate(zip(sizes[1:], ranks, strict=True)):
        bases.append(None if rank is None else orthonormal(groups, size, rank, seed + 17 * side))
        rows.append(size if rank in (None, size) else rank + 1)
    generator = torch.Generator().manual_seed(seed + 1000)
    drawn = torch.rand(groups, *rows, generator=generator, dtype=torch.float64)
    values = (drawn - 0.2).clamp(min=0.0)
    return Block(parameters, bases[0], bases[1], values, transposed)


def projections(basis: Tensor | None, group: int, size: int) -> list[Matrix]:
    """The projection on each direction of a side, and the one on its complement if it is thin."""
    vectors = np.eye(size) if basis is None else basis[group].double().numpy()
    found = [np.outer(vectors[:, i], vectors[:, i]) for i in range(vectors.shape[1])]
    if vectors.shape[1] < size:
        found.append(np.eye(size) - vectors @ vectors.T)
    return found


def completed(block: Block, side: int) -> list[Matrix]:
    """The orthogonal matrix of a side (0: outputs, 1: inputs), one for each group.

    That of a thin basis U with the signs D is `I - W S⁻¹ Wᵀ`, with `W = U D - E` and
    `S = I - D Uᵀ E`, for the unit vectors E. Where these are, and D, is a choice of the block.
    """
    basis = (block.gradient_basis, block.activation_basis)[side]
    groups, size = block.shape[0], block.shape[1 + side]
    if basis is None:
        return [np.eye(size)] * groups
    if basis.shape[2] == size:
        return list(basis.double().numpy())
    chosen = complete(basis)
    eye = torch.eye(size, dtype=basis.dtype).repeat(groups, 1, 1)
    found = []
    for group, own in enumerate(
        kronecker.to_eigenbasis(eye, None, chosen.rotation).double().numpy()
    ):
        vectors = basis[group].double().numpy()
        places = chosen.positions[group].numpy()
        units = np.eye(size)[:, places]
        signed = vectors * np.sign((vectors * own[:, places]).sum(axis=0))
        difference = signed - units
        system = np.eye(len(places)) - signed.T @ units
        found.append(np.eye(size) - difference @ np.linalg.solve(system, difference.T))
    return found


def spread(block: Block, group: int) -> Matrix:
    """The eigenvalue of each coordinate in the completed bases, `[d_out, d_in]`."""
    rows, columns = (
        _row_of_each_coordinate(basis, group, size)
        for basis, size in zip(
            (block.gradient_basis, block.activation_basis), block.shape[1:], strict=True
        )
    )
    return block.eigenvalues[group].double().numpy()[np.ix_(rows, columns)]


def _row_of_each_coordinate(basis: Tensor | None, group: int, size: int) -> list[int]:
    if basis is None or basis.shape[2] == size:
        return list(range(size))
    places = complete(basis).positions[group].tolist()
    rank = basis.shape[2]
    return [places.index(entry) if entry in places else rank for entry in range(size)]


def dense_groups(block: Block, sizes: tuple[int, int]) -> list[Matrix]:
    """The matrix of each group over its entries, row by row."""
    dense = []
    for group, values in enumerate(block.eigenvalues.double().numpy()):
        left = projections(block.gradient_basis, group, sizes[0])
        right = projections(block.activation_basis, group, sizes[1])
        assert values.shape == (len(left), len(right))
        total = np.zeros((sizes[0] * sizes[1],) * 2)
        for p, of_outputs in enumerate(left):
            for q, of_inputs in enumerate(right):
                total += values[p, q] * np.kron(of_outputs, of_inputs)
        dense.append(total)
    return dense


def partial_traces(dense: Matrix, sizes: tuple[int, int]) -> tuple[Matrix, Matrix]:
    """Of a matrix over the entries of `[d_out, d_in]`: over the inputs, and over the outputs."""
    d_out, d_in = sizes
    split = dense.reshape(d_out, d_in, d_out, d_in)
    of_outputs, of_inputs = np.zeros((d_out, d_out)), np.zeros((d_in, d_in))
    for entry in range(d_in):
        of_outputs += split[:, entry, :, entry]
    for entry in range(d_out):
        of_inputs += split[entry, :, entry, :]
    return of_outputs, of_inputs


def block_positions(
    sizes: Sequence[int], *, transposed: bool = False, joint: bool = False
) -> list[NDArray[np.int64]]:
    """For each group, where its entries are among those of `[weight, bias]`, flat, row by row."""
    groups, d_out, d_in = sizes
    columns = d_in - joint
    weight = np.arange(groups * d_out * columns)
    found = []
    for group in range(groups):
        place = np.zeros((d_out, d_in), dtype=np.int64)
        for row in range(d_out):
            if joint:
                place[row, 0] = len(weight) + group * d_out + row
            for column in range(columns):
                inner = column * d_out + row if transposed else row * columns + column
                place[row, column + joint] = group * d_out * columns + inner
        found.append(place.reshape(-1))
    return found
