"""One side of blocks that are merged: its new basis, and how much of it is kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rotate_ewc.curvature.sides import Side, merged_basis, merged_rank
from tests.helpers.thin import orthonormal, projections

SIZE = 6


def side(rank: int | None, seed: int = 0, size: int = SIZE, groups: int = 2) -> Side:
    """A side of some rank (None is the identity) of a parameter that has grown from a size."""
    generator = torch.Generator().manual_seed(seed)
    rows = size if rank is None or rank == size else rank + 1
    weights = torch.rand(groups, rows, generator=generator, dtype=torch.float64) + 0.1
    if rank is None:
        return Side(None, size, weights)
    basis = torch.zeros(groups, SIZE, rank, dtype=torch.float64)
    basis[:, :size] = orthonormal(groups, size, rank, seed)
    return Side(basis, size, weights)


def zero(one: Side) -> Side:
    return Side(one.basis, one.size, torch.zeros_like(one.weights))


def dense_sum(sides: Sequence[Side], group: int) -> np.ndarray[Any, Any]:
    """Projection by projection, on the leading entries of the parameter as it is now."""
    total = np.zeros((SIZE, SIZE))
    for one in sides:
        basis = None if one.basis is None else one.basis[:, : one.size]
        for weight, p in zip(
            one.weights[group].tolist(), projections(basis, group, one.size), strict=True
        ):
            total[: one.size, : one.size] += weight * p
    return total


KINDS = {
    "whole": [side(6, 1), side(6, 2)],
    "thin": [side(2, 1), side(1, 2)],
    "thin and whole": [side(2, 1), side(6, 2)],
    "whole and thin": [side(6, 1), side(2, 2)],
    "thin and the identity": [side(2, 1), side(None, 2)],
    "grown": [side(1, 1, 4), side(1, 2, 6)],
    "grown twice": [side(2, 1, 4), side(1, 2, 6), side(3, 3, 5)],
    "grown, one of them whole": [side(4, 1, 4), side(2, 2)],
    "a thin one of zeros": [zero(side(2, 1)), side(6, 2)],
    "a whole one of zeros": [side(2, 1), zero(side(6, 2))],
}


@pytest.mark.parametrize("kind", KINDS)
def test_eigenvectors_of_the_dense_sum(kind: str) -> None:
    """All, or those that differ from the rest: what is left out is a multiple of the identity.

    Of what has grown, in each part between two sizes.
    """
    sides = KINDS[kind]
    with torch.device("meta"):  # where nothing of the sides is
        basis = merged_basis(sides, SIZE, "label")
    assert basis is not None
    assert basis.dtype == torch.float64
    for group, vectors in enumerate(basis.numpy()):
        exact = dense_sum(sides, group)
        np.testing.assert_allclose(vectors.T @ vectors, np.eye(vectors.shape[1]), atol=1e-12)
        values = (vectors * (exact @ vectors)).sum(axis=0)
        np.testing.assert_allclose(exact @ vectors, vectors * values, atol=1e-12)
        rest = exact - vectors @ np.diag(values) @ vectors.T
        complement = np.eye(SIZE) - vectors @ vectors.T
        ends = sorted({one.size for one in sides})
        for start, end in zip([0, *ends], [*ends, SIZE], strict=True):
            rows = slice(start, end)
            if np.abs(complement[rows]).sum() > 1e-9:
                mean = (exact @ complement)[rows, rows].trace() / complement[rows, rows].trace()
                np.testing.assert_allclose(rest[rows], mean * complement[rows], atol=1e-12)


@pytest.mark.parametrize(("count", "expected"), [(2, 2), (16, 1)])
def test_directions_that_several_have_in_common_count_once(count: int, expected: int) -> None:
    """They are known to √ε of the largest singular value, that of all of them together.

    One of them is turned by 4 · 10⁻⁸, which is between 2 √ε and 4 √ε.
    """
    weights = torch.tensor([[2.0, 1.0]], dtype=torch.float64)
    plain = torch.eye(SIZE, 1, dtype=torch.float64)[None]
    turned = plain.clone()
    turned[0, 1] = 4e-8
    sides = [Side(plain, SIZE, weights)] * (count - 1)
    basis = merged_basis([*sides, Side(turned, SIZE, weights)], SIZE, "label")
    assert basis is not None
    assert basis.shape == (1, SIZE, expected)


@pytest.mark.parametrize(
    ("sides", "expected"),
    [
        ([side(2), side(3)], 3),
        ([side(2), side(6)], None),
        ([side(2), side(None)], None),
        ([side(2), zero(side(6))], 2),
        ([zero(side(3)), side(2)], 2),
        ([zero(side(3)), zero(side(2))], 3),
        ([side(4, size=4), side(2)], None),  # all of what it was, though not of what it is
        ([side(None, size=4), side(2)], None),
        ([side(3, size=4), side(2)], 3),
    ],
)
def test_as_many_as_the_side_with_the_most(sides: Sequence[Side], expected: int | None) -> None:
    assert merged_rank(sides) == expected
    assert merged_rank(sides[::-1]) == expected


@pytest.mark.parametrize("kind", ["whole", "thin", "thin and whole"])
def test_sums_that_cannot_be_decomposed_are_named(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def eigh(matrix: Tensor, **_: Any) -> Any:
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    with pytest.raises(ValueError, match=r"^eigh of the \d × \d sum of this side did not"):
        merged_basis(KINDS[kind], SIZE, "sum of this side")
