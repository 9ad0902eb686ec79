"""Thin bases completed to orthogonal matrices, to a few units in the last place."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rotate_ewc.linalg import kronecker
from rotate_ewc.linalg.completion import CompletedBasis, complete
from tests.helpers.thin import orthonormal


def written_out(completed: CompletedBasis, size: int) -> Tensor:
    """Q, from what rotating the identity gives."""
    groups = completed.positions.shape[0]
    parts = [t for t in (completed.matrix, completed.reflector) if t is not None]
    eye = torch.eye(size, dtype=parts[0].dtype).repeat(groups, 1, 1)
    return kronecker.to_eigenbasis(eye, None, completed.rotation)


def deviation(basis: Tensor) -> float:
    """How far columns are from orthonormal."""
    gram = basis.double().mT @ basis.double()
    return float((gram - torch.eye(gram.shape[-1], dtype=torch.float64)).abs().max())


def unit_vectors(size: int, rank: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64)[None, :, size - rank :].contiguous()


def with_zero_rows(size: int, rank: int) -> Tensor:
    """Every other row is zero, the first one too."""
    basis = torch.zeros(1, size, rank, dtype=torch.float64)
    basis[:, 1::2] = orthonormal(1, len(range(1, size, 2)), rank, 3)
    return basis


BASES: dict[str, Callable[[], Tensor]] = {
    "one direction": lambda: orthonormal(2, 9, 1, 0),
    "all but one": lambda: orthonormal(2, 9, 8, 1),
    "a third": lambda: orthonormal(3, 30, 10, 2),
    "half": lambda: orthonormal(1, 40, 20, 2),
    "zero rows": lambda: with_zero_rows(64, 7),
    "unit vectors": lambda: unit_vectors(20, 6),
    "negative unit vectors": lambda: -unit_vectors(20, 6),
    "leading identity": lambda: torch.eye(20, 6, dtype=torch.float64)[None],
    "negative identity": lambda: -torch.eye(20, 6, dtype=torch.float64)[None],
    "most of the negative identity": lambda: -torch.eye(20, 19, dtype=torch.float64)[None],
    "constant": lambda: torch.full((1, 16, 1), 0.25, dtype=torch.float64),
    "two entries": lambda: torch.eye(2, 1, dtype=torch.float64)[None],
    "no pivot is large": lambda: orthonormal(1, 500, 40, 5),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", BASES)
def test_is_orthogonal_and_has_the_columns(kind: str, dtype: torch.dtype) -> None:
    basis = BASES[kind]().to(dtype)
    groups, size, rank = basis.shape
    completed = complete(basis)
    matrix = written_out(completed, size).double()
    assert matrix.shape == (groups, size, size)
    # As good as the basis itself is, and a few units in the last place.
    within = 4 * torch.finfo(dtype).eps + 4 * deviation(basis)
    assert deviation(matrix) <= within
    for group in range(groups):
        positions = completed.positions[group].tolist()
        assert len(set(positions)) == rank
        columns = matrix[group][:, positions]
        signs = (columns * basis[group].double()).sum(dim=0).sign()
        error = (columns * signs - basis[group].double()).abs().max()
        assert float(error) <= within


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_wide_ones_keep_lengths_and_lead_back(dtype: torch.dtype) -> None:
    """As wide as layers of language models, where all of Q would be large."""
    completed = complete(orthonormal(1, 4096, 64, 6).to(dtype))
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(1, 8, 4096, generator=generator, dtype=torch.float64).to(dtype)
    there = kronecker.to_eigenbasis(vectors, None, completed)
    back = kronecker.from_eigenbasis(there, None, completed)
    within = 64 * torch.finfo(dtype).eps
    norms = torch.linalg.vector_norm(vectors.double(), dim=2)
    torch.testing.assert_close(
        torch.linalg.vector_norm(there.double(), dim=2), norms, rtol=within, atol=0
    )
    assert float((back - vectors).abs().max()) <= within * float(vectors.abs().max())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rows_of_zeros_keep_their_unit_vectors_to_the_bit(dtype: torch.dtype) -> None:
    matrix = written_out(complete(with_zero_rows(64, 7).to(dtype)), 64)[0]
    eye = torch.eye(64, dtype=dtype)
    assert torch.equal(matrix[::2], eye[::2])
    assert torch.equal(matrix[:, ::2], eye[:, ::2])


@pytest.mark.parametrize("ranks", [(3, 2), (5, 2), (3, 9)], ids=str)
def test_there_and_back(ranks: tuple[int, int]) -> None:
    """One matrix and several, with reflectors and with matrices that are written out."""
    bases = [complete(orthonormal(2, size, k, 4)) for size, k in zip((8, 11), ranks, strict=True)]
    rotations = [b.rotation for b in bases]
    left, right = (written_out(b, size) for b, size in zip(bases, (8, 11), strict=True))
    generator = torch.Generator().manual_seed(0)
    several = torch.randn(3, 2, 8, 11, generator=generator, dtype=torch.float64)
    expected = torch.einsum("gai,kgab,gbj->kgij", left, several, right)
    torch.testing.assert_close(kronecker.to_eigenbasis(several, *rotations), expected)
    torch.testing.assert_close(kronecker.from_eigenbasis(expected, *rotations), several)
    for one, rotated in zip(several, expected, strict=True):
        torch.testing.assert_close(kronecker.to_eigenbasis(one, *rotations), rotated)
        torch.testing.assert_close(kronecker.from_eigenbasis(rotated, *rotations), one)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_cheaper_form_in_the_dtype_and_on_the_device_of_the_basis(dtype: torch.dtype) -> None:
    """The matrix itself from half of the directions on."""
    for size, rank, is_matrix in ((9, 4, False), (9, 5, True), (8, 4, True), (8, 1, False)):
        basis = orthonormal(2, size, rank, 1).to(dtype)
        with torch.device("meta"):  # where nothing of the basis is
            completed = complete(basis)
            numbers = completed.numbers(size)
        assert (completed.matrix is not None) == is_matrix
        parts = [completed.matrix, completed.reflector, completed.weighted]
        found = [part for part in parts if part is not None]
        assert len(found) == (1 if is_matrix else 2)
        assert {(part.dtype, part.device.type) for part in found} == {(dtype, "cpu")}
        assert completed.rotation is (completed.matrix if is_matrix else completed)
        for group, positions in enumerate(completed.positions.tolist()):
            assert numbers[group].tolist() == [
                positions.index(entry) if entry in positions else rank for entry in range(size)
            ]


def test_a_matrix_has_no_factors() -> None:
    message = "^a basis of most directions has no reflector$"
    completed = complete(orthonormal(2, 9, 5, 1))
    part = orthonormal(2, 9, 4, 1)
    for one in (
        completed,
        CompletedBasis(completed.positions, None, part, None),
        CompletedBasis(completed.positions, None, None, part),
    ):
        with pytest.raises(RuntimeError, match=message):
            _ = one.factors


def test_a_basis_that_is_slightly_off_is_completed_to_one_that_is_not() -> None:
    """As bases are that were stored in fewer bits: its columns are made orthonormal in order."""
    basis = orthonormal(1, 50, 8, 7).bfloat16().float()
    completed = complete(basis)
    matrix = written_out(completed, 50).double()
    assert deviation(basis) > 1e-3
    assert deviation(matrix) <= 4 * torch.finfo(torch.float32).eps
    expected = torch.linalg.qr(basis.double())[0]
    columns = matrix[0][:, completed.positions[0]]
    signs = (columns * expected[0]).sum(dim=0).sign()
    torch.testing.assert_close(columns * signs, expected[0], rtol=0, atol=1e-6)


def test_the_same_bits_each_time_also_in_inference_mode() -> None:
    basis = orthonormal(2, 30, 5, 8)
    first = complete(basis)
    with torch.inference_mode():
        second = complete(basis)
    assert torch.equal(first.positions, second.positions)
    for one, other in zip(first.factors, second.factors, strict=True):
        assert torch.equal(one, other)
        assert not other.is_inference()
