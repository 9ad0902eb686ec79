"""Thin bases: every kept eigenvalue, and every mean over a complement, against dense matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rotate_ewc.linalg.block import Block
from tests.helpers.exactness import (
    ALL_SETTINGS,
    TOLERANCE,
    Setting,
    exact,
    exact_matrix_of,
    ignore_even_kernels,
    over_all_settings,
)

pytestmark = ignore_even_kernels

RANKS: tuple[tuple[int | str, ...], ...] = ((1, "half"), (2, "whole"))


def projections(basis: Tensor | None, size: int) -> Tensor:
    """The projection on each kept direction, and that on all others over their number.

    Returns:
        `[K, size, size]`.
    """
    vectors = torch.eye(size, dtype=torch.float64) if basis is None else basis
    found = [torch.outer(vector, vector) for vector in vectors.mT]
    if vectors.shape[1] < size:
        rest = torch.eye(size, dtype=torch.float64) - vectors @ vectors.mT
        found.append(rest / (size - vectors.shape[1]))
    return torch.stack(found)


def means(block: Block, matrix: Tensor) -> Tensor:
    """`tr((P ⊗ R) B)` for all projections P and R of a block, in the shape of its eigenvalues."""
    _, d_out, d_in = block.shape
    split = matrix.reshape(-1, d_out, d_in, d_out, d_in)
    found = []
    for group, part in enumerate(split):
        sides = [
            projections(None if basis is None else basis[group], size)
            for basis, size in ((block.gradient_basis, d_out), (block.activation_basis, d_in))
        ]
        found.append(torch.einsum("poq,aiu,oiqu->pa", *sides, part))
    return torch.stack(found)


def rank_of(setting: Setting, rank: int | str) -> int | dict[str, int]:
    """Half of the larger side of each parameter, or all of it, or a number."""
    if isinstance(rank, int):
        return rank
    sizes = {name: max(shape, default=1) for name, shape in setting.shapes().items()}
    if rank == "half":
        return {name: max(1, size // 2) for name, size in sizes.items()}
    return 10**6


@over_all_settings
def test_eigenvalues_and_means_are_exact(setting: Setting) -> None:
    """Whatever orthonormal columns came out; also the trace. The ranks take turns."""
    matrices = exact(setting)
    trace = float(exact_matrix_of(setting).trace())
    for rank in RANKS[ALL_SETTINGS.index(setting) % 2]:
        operator = setting.estimate(rank=rank_of(setting, rank))
        assert {block.parameters for block in operator.blocks} == {*matrices}
        for block in operator.blocks:
            check_block(block, matrices[block.parameters])
            if isinstance(rank, int):
                bases = (block.gradient_basis, block.activation_basis)
                assert all(1 <= basis.shape[2] <= rank for basis in bases if basis is not None)
        assert float(operator.trace) == pytest.approx(trace, rel=TOLERANCE)


def check_block(block: Block, matrix: Tensor) -> None:
    expected = means(block, matrix)
    assert block.eigenvalues.shape == expected.shape
    error = (block.eigenvalues - expected).abs().max()
    assert error <= TOLERANCE * matrix.abs().max(), block.label
    assert bool((block.eigenvalues >= 0).all())
    for basis in (block.gradient_basis, block.activation_basis):
        if basis is not None:
            assert basis.is_contiguous()
            gram = basis.mT @ basis
            eye = torch.eye(basis.shape[2], dtype=torch.float64).expand_as(gram)
            torch.testing.assert_close(gram, eye, rtol=0.0, atol=1e-12)
