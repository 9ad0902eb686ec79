"""Merging thin blocks: the exact means of the dense sum, in the directions that are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise, permutations

import numpy as np
import pytest
import torch

from rotate_ewc import EKFACLinearOperator, merge
from rotate_ewc.linalg.block import Block
from rotate_ewc.provenance import Provenance
from tests.helpers.thin import (
    Matrix,
    dense_groups,
    orthonormal,
    partial_traces,
    projections,
    thin_block,
)

SIZES = (2, 6, 8)
Ranks = tuple[int | None, int | None]


def operator_of(block: Block) -> EKFACLinearOperator:
    groups, d_out, d_in = block.shape
    shapes = {"w": (groups * d_out, d_in)}
    return EKFACLinearOperator.from_blocks(
        [block], shapes, Provenance("MSELoss", "mean", "type2", 10, 20.0)
    )


def decaying(block: Block) -> Block:
    """The same with next to nothing outside of what is kept."""
    values = block.eigenvalues.clone()
    if block.ranks[0] < block.shape[1]:
        values[:, -1] *= 1e-3
    if block.ranks[1] < block.shape[2]:
        values[:, :, -1] *= 1e-3
    return block.with_eigenvalues(values)


def merged(blocks: Sequence[Block], weights: Sequence[float] | None = None) -> Block:
    return merge([operator_of(block) for block in blocks], weights).blocks[0]


def grown(dense: Matrix, inner: tuple[int, int], outer: tuple[int, int]) -> Matrix:
    """A matrix over the leading entries of a larger parameter, zero elsewhere."""
    whole = np.zeros((*outer, *outer))
    whole[: inner[0], : inner[1], : inner[0], : inner[1]] = dense.reshape(*inner, *inner)
    return whole.reshape(outer[0] * outer[1], -1)


def dense_sum(
    blocks: Sequence[Block], weights: Sequence[float], sizes: tuple[int, int]
) -> list[Matrix]:
    """Of the blocks of each group."""
    totals = [np.zeros((sizes[0] * sizes[1],) * 2) for _ in range(blocks[0].shape[0])]
    for block, weight in zip(blocks, weights, strict=True):
        own = block.shape[1:]
        for total, dense in zip(totals, dense_groups(block, own), strict=True):
            total += weight * grown(dense, own, sizes)
    return totals


def check_exact_means(result: Block, exact: Sequence[Matrix]) -> None:
    """The trace, and every eigenvalue: the mean over its directions of the sum's diagonal."""
    sizes = result.shape[1:]
    np.testing.assert_allclose(float(result.trace), sum(map(np.trace, exact)), rtol=1e-10)
    assert bool((result.eigenvalues >= 0).all())
    for group, dense in enumerate(exact):
        left = projections(result.gradient_basis, group, sizes[0])
        right = projections(result.activation_basis, group, sizes[1])
        for i, p in enumerate(left):
            for j, q in enumerate(right):
                mean = np.trace(dense @ np.kron(p, q)) / np.trace(p) / np.trace(q)
                got = float(result.eigenvalues[group, i, j])
                np.testing.assert_allclose(got, mean, rtol=1e-9, atol=1e-10)


def check_bases_are_eigenvectors(result: Block, exact: Sequence[Matrix]) -> None:
    """Of the sum's partial traces, which have the eigenvalues' own partial sums there."""
    for group, dense in enumerate(exact):
        for basis, trace, sums in zip(
            (result.gradient_basis, result.activation_basis),
            partial_traces(dense, result.shape[1:]),
            result.partial_traces,
            strict=True,
        ):
            assert basis is not None
            vectors = basis[group].numpy()
            np.testing.assert_allclose(vectors.T @ vectors, np.eye(vectors.shape[1]), atol=1e-12)
            values = sums[group].numpy()[: vectors.shape[1]]
            np.testing.assert_allclose(trace @ vectors, vectors * values, atol=1e-9)


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        (((1, 1), (1, 1)), (1, 1)),
        (((2, 2), (2, 2)), (2, 2)),
        (((3, 4), (3, 4), (3, 4)), (3, 4)),
        (((5, 7), (5, 7)), (5, 7)),
        (((2, 4), (3, 1)), (3, 4)),
        (((6, 8), (6, 8)), (6, 8)),
        (((2, 3), (6, 8)), (6, 8)),  # as many as the block with the most
        (((2, 3), (6, 2)), (6, 3)),
        (((2, 8), (3, 8)), (3, 8)),
        (((2, None), (3, 3)), (3, 8)),
    ],
    ids=str,
)
def test_exact_means_in_the_leading_eigenvectors(
    ranks: Sequence[Ranks], expected: tuple[int, int]
) -> None:
    blocks = [decaying(thin_block(SIZES, each, seed=31 * n)) for n, each in enumerate(ranks)]
    weights = [1.0, 0.5, 2.0][: len(blocks)]
    exact = dense_sum(blocks, weights, SIZES[1:])
    result = merged(blocks, weights)
    assert result.ranks == expected
    check_exact_means(result, exact)
    check_bases_are_eigenvectors(result, exact)
    for group, dense in enumerate(exact):
        for side, trace in enumerate(partial_traces(dense, SIZES[1:])):
            largest = np.linalg.eigvalsh(trace)[::-1][: expected[side]]
            kept = result.partial_traces[side][group, : expected[side]].sort().values.flip(0)
            np.testing.assert_allclose(kept.numpy(), largest, rtol=1e-9)


@pytest.mark.parametrize(
    "ranks", [(1, 1), (2, 2), (3, 4), (5, 7), (6, 3), (None, 3), (2, None)], ids=str
)
def test_exact_in_the_same_bases(ranks: Ranks) -> None:
    """Also where what is kept is less than the mean over the rest."""
    block = thin_block(SIZES, ranks, seed=2)
    other = block.with_eigenvalues(thin_block(SIZES, ranks, seed=77).eigenvalues)
    result = merged([block, other], [1.0, 3.0])
    assert result.ranks == block.ranks
    expected = dense_sum([block, other], [1.0, 3.0], SIZES[1:])
    for got, exact in zip(dense_groups(result, SIZES[1:]), expected, strict=True):
        # Equal partial traces leave a choice; random ones are not.
        check = partial_traces(got, SIZES[1:])
        for a, b in zip(check, partial_traces(exact, SIZES[1:]), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-9)
        np.testing.assert_allclose(got, exact, atol=1e-7)


def test_bases_that_differ_by_rounding_are_the_same() -> None:
    """As after a file in fewer bits: rank is not spent on what they differ by."""
    block = thin_block((1, 6, 8), (2, 3), seed=2).map(torch.Tensor.float)
    shaken = replace(
        block,
        gradient_basis=torch.linalg.qr(block.gradient_basis * (1 + 1e-7))[0],
        activation_basis=torch.linalg.qr(block.activation_basis + 1e-7)[0],
    )
    result = merged([block, shaken])
    (exact,) = dense_sum([block, shaken], [1.0, 1.0], (6, 8))
    (got,) = dense_groups(result, (6, 8))
    assert np.linalg.norm(got - exact) <= 1e-5 * np.linalg.norm(exact)


def test_order_does_not_matter() -> None:
    blocks = [thin_block(SIZES, (2, 3), seed=n) for n in range(3)]
    first, *others = (
        dense_groups(merged([blocks[i] for i in order]), SIZES[1:])[0]
        for order in permutations(range(3))
    )
    for other in others:
        np.testing.assert_allclose(other, first, atol=1e-9)


def test_nearer_to_the_whole_merge_the_more_are_kept() -> None:
    blocks = [thin_block((1, 6, 8), (6, 8), seed=n) for n in (4, 5)]
    operators = [operator_of(block) for block in blocks]
    (whole,) = dense_groups(merged(blocks), (6, 8))
    distances = []
    for rank in range(1, 9):
        result = merge(operators, rank=rank).blocks[0]
        assert result.ranks == (min(rank, 6), rank)
        check_exact_means(result, dense_sum(blocks, [1.0, 1.0], (6, 8)))
        distances.append(np.linalg.norm(dense_groups(result, (6, 8))[0] - whole))
    assert all(a >= b - 1e-12 for a, b in pairwise(distances))
    assert distances[0] > 0.1
    assert distances[-1] == 0.0


def test_rank_is_that_of_the_sum() -> None:
    """Of all directions that any of the summands keeps, or of one alone."""
    blocks = [thin_block((1, 20, 30), (3, 4), seed=n) for n in (4, 5)]
    operators = [operator_of(block) for block in blocks]
    for rank, expected in (
        (None, (3, 4)),
        (5, (5, 5)),
        ("full", (6, 8)),
        ({"v": 1, "w": 2}, (2, 2)),
        (100, (6, 8)),
    ):
        assert merge(operators, rank=rank).blocks[0].ranks == expected
    assert merge(operators[:1], rank=2).blocks[0].ranks == (2, 2)
    with pytest.raises(ValueError, match="rank is 0"):
        merge(operators, rank=0)


@pytest.mark.parametrize("damping", [0.0, 0.5])
@pytest.mark.parametrize("rank", [(6, 8), (4, 5)])
def test_part_of_the_trace(rank: tuple[int, int], damping: float) -> None:
    """The fewest with which no more is averaged than may be; what all have in common is not."""
    block = decaying(thin_block((1, 6, 8), rank, seed=8))
    operator = operator_of(block).damped(damping)
    (dense,) = dense_groups(operator.blocks[0], (6, 8))
    for part in (0.5, 0.8, 0.95):
        kept = merge([operator], rank=part).blocks[0].ranks
        for side, trace in enumerate(partial_traces(dense, (6, 8))):
            values = np.sort(np.linalg.eigvalsh(trace))[::-1]
            allowed = (1.0 - part) * np.trace(trace)
            lost = [float((values[k:] - values[-1]).sum()) for k in range(len(values))]
            assert kept[side] == next(k for k in range(1, 9) if lost[k] <= allowed)


@pytest.mark.parametrize(
    ("small", "large"),
    [
        ((2, 2), (3, 3)),
        ((1, 3), (7, 2)),
        ((4, 5), (2, 2)),
        ((None, 2), (2, 3)),
        ((2, 5), (None, 3)),
    ],
    ids=str,
)
def test_parameters_that_have_grown(small: Ranks, large: Ranks) -> None:
    """By outputs and inputs: the first is on the leading slice for which it was made."""
    blocks = [thin_block((1, 4, 5), small, seed=1), thin_block((1, 7, 9), large, seed=2)]
    for order in (blocks, blocks[::-1]):
        exact = dense_sum(order, [1.0, 2.0], (7, 9))
        result = merged(order, [1.0, 2.0])
        assert result.shape == (1, 7, 9)
        check_exact_means(result, exact)
        check_bases_are_eigenvectors(result, exact)


def test_blocks_of_zeros_cost_no_directions() -> None:
    """As parameters have of which no output depended; their sides are the identity."""
    block = thin_block((1, 6, 8), (2, 3), seed=3)
    zeros = Block(("w",), None, None, torch.zeros(1, 6, 8, dtype=torch.float64))
    for blocks in ([block, zeros], [zeros, block]):
        result = merged(blocks)
        assert result.ranks == (2, 3)
        np.testing.assert_allclose(
            dense_groups(result, (6, 8))[0], dense_groups(block, (6, 8))[0], atol=1e-12
        )
    none = block.with_eigenvalues(torch.zeros_like(block.eigenvalues))
    assert not bool(merged([none, none]).eigenvalues.any())


@pytest.mark.parametrize("other", [3, 8])
def test_what_is_never_on_keeps_unit_vectors(other: int) -> None:
    """Rows of zeros stay rows of zeros, and with a whole basis unit vectors, to the bit."""
    dead, live = [0, 3, 7], [1, 2, 4, 5, 6]
    blocks = []
    for seed, rank in ((1, 2), (2, other)):
        basis = torch.zeros(1, 8, rank, dtype=torch.float64)
        if rank == 8:
            basis[0, dead, [0, 1, 2]] = 1.0
            basis[0, live, 3:] = orthonormal(1, 5, 5, seed)[0]
        else:
            basis[0, live] = orthonormal(1, 5, rank, seed)[0]
        plain = thin_block((1, 6, 8), (2, rank), seed=seed)
        blocks.append(replace(plain, activation_basis=basis))
    basis = merged(blocks).activation_basis
    assert basis is not None
    rows = basis[0, dead]
    assert bool((rows.ne(0).sum(dim=1) == (1 if other == 8 else 0)).all())
    assert bool((rows.abs().sum(dim=1) == (1.0 if other == 8 else 0.0)).all())


def test_traces_survive_many_merges_one_by_one() -> None:
    blocks = [thin_block((1, 12, 15), (3, 4), seed=n) for n in range(30)]
    result = blocks[0]
    for block in blocks[1:]:
        result = merged([result, block])
        assert result.ranks == (3, 4)
    total = sum(float(block.trace) for block in blocks)
    assert float(result.trace) == pytest.approx(total, rel=1e-10)
    assert bool((result.eigenvalues >= 0).all())
