"""Squares in thin bases, and sums over their complements, against loops over examples."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from rotate_ewc.linalg import thin_eigenvalues
from rotate_ewc.linalg.thin_eigenvalues import ThinRoute, cheapest_thin_route, summed_projections
from tests.helpers.memory import peak_bytes
from tests.helpers.thin import orthonormal

MANY_POSITIONS = (ThinRoute.PAIRS, ThinRoute.GRAMS, ThinRoute.EXAMPLES)
# Kept directions of 5 outputs and 7 inputs; None is the identity.
SIDES = [s for s in itertools.product((None, 1, 3, 5), (None, 1, 4, 7)) if s != (None, None)]


def seeded(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def basis_of(groups: int, size: int, rank: int | None, seed: int) -> Tensor | None:
    return None if rank is None else orthonormal(groups, size, rank, seed)


def projections(basis: Tensor | None, size: int) -> list[Tensor]:
    """On each kept direction, and on all others."""
    kept = torch.eye(size, dtype=torch.float64) if basis is None else basis
    found = [torch.outer(vector, vector) for vector in kept.T]
    rest = torch.eye(size, dtype=torch.float64) - kept @ kept.T
    return [*found, rest] if kept.shape[1] < size else found


def by_loops(matrices: Sequence[Tensor], left: Tensor | None, right: Tensor | None) -> Tensor:
    """`Σ ‖P G R‖²` over matrices G, `[n, d_out, d_in]` for each group, for all projections."""
    totals = []
    for group, examples in enumerate(matrices):
        _, d_out, d_in = examples.shape
        of_outputs = projections(None if left is None else left[group], d_out)
        of_inputs = projections(None if right is None else right[group], d_in)
        total = torch.zeros(len(of_outputs), len(of_inputs), dtype=torch.float64)
        for matrix in examples:
            for i, p in enumerate(of_outputs):
                for j, r in enumerate(of_inputs):
                    total[i, j] += (p @ matrix @ r).square().sum()
        totals.append(total)
    return torch.stack(totals)


def examples_of(gradients: Sequence[Tensor], activations: Tensor) -> list[Tensor]:
    parts = [
        torch.stack([g[group, n].T @ activations[group, n] for n in range(g.shape[1])])
        for g in gradients
        for group in range(len(activations))
    ]
    groups = len(activations)
    return [torch.cat(parts[group::groups]) for group in range(groups)]


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("shared", [1, 2, 6])
@pytest.mark.parametrize("ranks", SIDES, ids=str)
def test_every_route_agrees_with_loops(
    ranks: tuple[int | None, int | None], shared: int, groups: int, together: bool
) -> None:
    gradients = [seeded(groups, 4, shared, 5, seed=k) for k in range(2)]
    activations = seeded(groups, 4, shared, 7, seed=9)
    left, right = basis_of(groups, 5, ranks[0], 1), basis_of(groups, 7, ranks[1], 2)
    expected = by_loops(examples_of(gradients, activations), left, right)
    if together:
        gradients = [g.mT.contiguous().mT for g in gradients]
        activations = activations.mT.contiguous().mT
    routes = (*MANY_POSITIONS, ThinRoute.SINGLE) if shared == 1 else MANY_POSITIONS
    for route in routes:
        for max_bytes in (None, 1):
            before = activations.clone()
            found = summed_projections(iter(gradients), activations, left, right, route, max_bytes)
            torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
            assert torch.equal(activations, before)


@pytest.mark.parametrize("d_in", [1, 7])
@pytest.mark.parametrize("ranks", SIDES, ids=str)
def test_known_gradients_agree_with_loops(ranks: tuple[int | None, int | None], d_in: int) -> None:
    gradients = seeded(2, 4, 5, d_in)
    left = basis_of(2, 5, ranks[0], 1)
    right = basis_of(2, 7, ranks[1], 2) if d_in == 7 else None
    found = thin_eigenvalues.summed_entries(gradients, left, right)
    expected = by_loops(list(gradients), left, right)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("rank", [1, 3])
def test_lookups_agree_with_loops(rank: int) -> None:
    gradients, indices = seeded(3, 4, 5), torch.tensor([[0, 2, 2, 5], [5, -1, 0, 0], [1, 1, 1, 1]])
    basis = orthonormal(1, 5, rank, 3)
    matrices = torch.zeros(3, 5, 6, dtype=torch.float64)
    for n, s in itertools.product(range(3), range(4)):
        if indices[n, s] >= 0:
            matrices[n, :, indices[n, s]] += gradients[n, s]
    expected = by_loops([matrices], basis, None)[0].T
    found = thin_eigenvalues.summed_lookups(gradients, indices, 6, basis)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("rank", "thinner"), [(5, 5), (5, 2), (3, 3), (3, 1)])
def test_fewer_directions_are_the_last_ones(rank: int, thinner: int) -> None:
    matrices, basis = seeded(1, 6, 5, 3), orthonormal(1, 5, rank, 4)
    of_all = by_loops(list(matrices), basis, None)
    of_fewer = by_loops(list(matrices), basis[:, :, rank - thinner :], None)
    found = thin_eigenvalues.thinned(of_all, rank, thinner, 5)
    torch.testing.assert_close(found, of_fewer, rtol=1e-11, atol=1e-11)


def test_what_is_nothing_is_not_less() -> None:
    """In float32, where all that is there is kept."""
    basis = orthonormal(1, 60, 3, 0).float()
    vectors = seeded(1, 50, 3, 3).float() @ basis.mT
    inputs = seeded(1, 50, 3, 8, seed=1).float()
    for route in MANY_POSITIONS:
        found = summed_projections([vectors], inputs, basis, None, route)
        assert bool((found >= 0).all())
        assert found[0, -1].max() <= 1e-5 * found.max()


def test_the_route_depends_on_shapes() -> None:
    """One position; few; fewer than entries, in a wide layer; many, in a narrow one."""
    assert cheapest_thin_route(1, (64, 512), (64, 64), 1) is ThinRoute.SINGLE
    assert cheapest_thin_route(2, (64, 512), (64, 64), 1) is ThinRoute.PAIRS
    assert cheapest_thin_route(16, (256, 2304), (256, 256), 1) is ThinRoute.GRAMS
    assert cheapest_thin_route(1024, (64, 576), (64, 64), 1) is ThinRoute.EXAMPLES


@pytest.mark.parametrize("route", [ThinRoute.PAIRS, ThinRoute.GRAMS])
def test_nothing_is_as_large_as_a_wide_parameter(route: ThinRoute) -> None:
    gradients, activations = seeded(1, 4, 3, 500), seeded(1, 4, 3, 700)
    left, right = orthonormal(1, 500, 4, 0), orthonormal(1, 700, 4, 1)
    peak = peak_bytes(lambda: summed_projections([gradients], activations, left, right, route))
    assert peak < 8 * 500 * 700 / 10
