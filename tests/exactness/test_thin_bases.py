"""Thin bases: every kept eigenvalue, and every mean over a complement, against dense matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rotate_ewc.linalg.block import Block
from rotate_ewc.linalg.quadratic import quadratic_form
from tests.helpers.exactness import (
    ALL_SETTINGS,
    TOLERANCE,
    Setting,
    exact,
    exact_matrix_of,
    ignore_even_kernels,
)
from tests.helpers.oracles import in_own_basis

pytestmark = ignore_even_kernels

RANKS = (1, "half", 2, "whole")
# One of three that follow each other, so that rows of cases take turns.
SETTINGS = [s for n, s in enumerate(ALL_SETTINGS) if (n + n // 3) % 3 == 0]


def rank_of(setting: Setting, rank: int | str) -> int | dict[str, int]:
    """Half of the larger side of each parameter, or all of it, or a number."""
    if isinstance(rank, int):
        return rank
    sizes = {name: max(shape, default=1) for name, shape in setting.shapes().items()}
    if rank == "half":
        return {name: max(1, size // 2) for name, size in sizes.items()}
    return 10**6


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_eigenvalues_and_means_are_exact(setting: Setting) -> None:
    """Whatever orthonormal columns came out; also the trace. The ranks take turns."""
    number = SETTINGS.index(setting)
    rank = RANKS[(number + number // 4) % len(RANKS)]  # which so meet all that settings choose
    matrices = exact(setting)
    operator = setting.estimate(rank=rank_of(setting, rank))
    assert {block.parameters for block in operator.blocks} == {*matrices}
    for block in operator.blocks:
        check_block(block, matrices[block.parameters])
        check_kept_directions(block, matrices[block.parameters])
        if isinstance(rank, int):
            bases = (block.gradient_basis, block.activation_basis)
            assert all(1 <= basis.shape[2] <= rank for basis in bases if basis is not None)
    trace = float(exact_matrix_of(setting).trace())
    assert float(operator.trace) == pytest.approx(trace, rel=TOLERANCE)


def check_block(block: Block, matrix: Tensor) -> None:
    expected = in_own_basis(block, matrix)
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


def check_kept_directions(block: Block, matrix: Tensor) -> None:
    """Along what is kept of both sides the quadratic form is that of the exact matrix."""
    _, d_out, d_in = block.shape
    sides = (
        torch.eye(size, dtype=torch.float64).expand(len(matrix), -1, -1) if basis is None else basis
        for basis, size in ((block.gradient_basis, d_out), (block.activation_basis, d_in))
    )
    of_outputs, of_inputs = sides
    shapes = {block.parameters[0]: (len(matrix) * d_out, d_in - len(block.parameters) + 1)}
    if block.transposed:
        shapes = {block.parameters[0]: (len(matrix) * (d_in - len(block.parameters) + 1), d_out)}
    shapes.update({name: (len(matrix) * d_out,) for name in block.parameters[1:]})
    for i, j in {(0, 0), (block.ranks[0] - 1, block.ranks[1] - 1)}:
        direction = of_outputs[:, :, i, None] * of_inputs[:, None, :, j]
        flat = direction.flatten(1)
        expected = float((flat * (matrix @ flat[..., None])[..., 0]).sum())
        value = float(quadratic_form([block], block.split(direction, shapes)))
        assert abs(value - expected) <= TOLERANCE * float(matrix.abs().max()), block.label
