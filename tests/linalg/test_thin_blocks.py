"""Thin blocks against dense matrices of projections: what they are, and what is cut off them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from rotate_ewc.linalg.algebra import multiply
from rotate_ewc.linalg.block import Block
from rotate_ewc.linalg.cut import cut
from rotate_ewc.linalg.quadratic import quadratic_form, quadratic_gradient
from rotate_ewc.linalg.thin_products import thin_products
from tests.helpers.thin import (
    block_positions,
    dense_groups,
    orthonormal,
    partial_traces,
    thin_block,
)

SIZES = (2, 6, 8)
RANKS: list[tuple[int | None, int | None]] = [
    (1, 1),
    (2, 2),
    (3, 4),
    (5, 7),
    (6, 8),
    (6, 3),
    (2, 8),
    (None, 3),
    (2, None),
]
FORMS = [(transposed, joint) for transposed in (False, True) for joint in (False, True)]


def names(joint: bool) -> tuple[str, ...]:
    return ("w", "b") if joint else ("w",)


def shapes(sizes: tuple[int, int, int], transposed: bool, joint: bool) -> dict[str, list[int]]:
    groups, d_out, d_in = sizes
    columns = d_in - joint
    weight = [groups * columns, d_out] if transposed else [groups * d_out, columns]
    return {"w": weight, **({"b": [groups * d_out]} if joint else {})}


def flat(tensors: dict[str, Tensor]) -> np.ndarray:
    return torch.cat([tensor.flatten() for tensor in tensors.values()]).numpy()


@pytest.mark.parametrize("ranks", RANKS, ids=str)
@pytest.mark.parametrize(("transposed", "joint"), FORMS)
def test_rotated_the_matrix_is_the_spectrum(
    transposed: bool, joint: bool, ranks: tuple[int | None, int | None]
) -> None:
    """`Q diag(spectrum) Qᵀ`, column by column, is the sum of projections."""
    block = thin_block(SIZES, ranks, parameters=names(joint), transposed=transposed)
    assert block.shape == SIZES
    of_parameters = shapes(SIZES, transposed, joint)
    size = sum(np.prod(shape) for shape in of_parameters.values())
    expected = np.zeros((size, size))
    for place, dense in zip(
        block_positions(SIZES, transposed=transposed, joint=joint),
        dense_groups(block, SIZES[1:]),
        strict=True,
    ):
        expected[np.ix_(place, place)] = dense
    counts = [int(np.prod(shape)) for shape in of_parameters.values()]
    for index in range(size):
        unit = torch.zeros(size, dtype=torch.float64)
        unit[index] = 1.0
        parts = dict(zip(of_parameters, unit.split(counts), strict=True))
        tensors = {n: part.reshape(of_parameters[n]) for n, part in parts.items()}
        rotated = block.rotate(tensors)
        np.testing.assert_allclose(float(rotated.square().sum()), 1.0, rtol=1e-12)
        product = block.unrotate(block.spectrum * rotated, of_parameters)
        np.testing.assert_allclose(flat(product), expected[:, index], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("ranks", RANKS, ids=str)
@pytest.mark.parametrize(("transposed", "joint"), FORMS)
def test_products_and_quadratic_form_without_a_completion(
    transposed: bool, joint: bool, ranks: tuple[int | None, int | None]
) -> None:
    """Of one point and of several; value, gradient and second derivatives."""
    block = thin_block(SIZES, ranks, parameters=names(joint), transposed=transposed)
    of_parameters = shapes(SIZES, transposed, joint)
    counts = [int(np.prod(shape)) for shape in of_parameters.values()]
    dense = np.zeros((sum(counts), sum(counts)))
    for place, own in zip(
        block_positions(SIZES, transposed=transposed, joint=joint),
        dense_groups(block, SIZES[1:]),
        strict=True,
    ):
        dense[np.ix_(place, place)] = own

    def split(vector: Tensor) -> dict[str, Tensor]:
        parts = zip(of_parameters.items(), vector.split(counts, dim=-1), strict=True)
        return {n: part.reshape(*vector.shape[:-1], *shape) for (n, shape), part in parts}

    def form(vector: Tensor) -> Tensor:
        return quadratic_form([block], split(vector))

    generator = torch.Generator().manual_seed(1)
    points = torch.randn(3, sum(counts), generator=generator, dtype=torch.float64)
    products = points.numpy() @ dense
    close = partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-12)
    close(flat(quadratic_gradient([block], split(points[0]))), products[0])
    columns = multiply([block], split(points))
    close(torch.cat([c.flatten(1) for c in columns.values()], dim=1).numpy(), products)
    values = (products * points.numpy()).sum(axis=1)
    close(torch.func.vmap(form)(points).numpy(), values)
    d = points[0].clone().requires_grad_()
    value = form(d)
    close(value.detach().numpy(), values[0])
    for _ in range(2):
        (gradient,) = torch.autograd.grad(3.0 * value, d, retain_graph=True)
        close(gradient.numpy(), 6.0 * products[0])
    close(torch.autograd.functional.hessian(form, points[0]).numpy(), 2.0 * dense)
    close(torch.func.vmap(torch.func.grad(form))(points).numpy(), 2.0 * products)
    assert not {"_completed", "_rotations", "_spread"} & vars(block).keys() or not block.is_thin


@pytest.mark.parametrize("ranks", [(None, None), (6, None), (None, 8), (6, 8)], ids=str)
def test_products_of_whole_bases_are_others(ranks: tuple[int | None, int | None]) -> None:
    block = thin_block(SIZES, ranks)
    assert block.products is None
    with pytest.raises(ValueError, match=r"^neither basis is thin; expected one that is$"):
        thin_products(block.gradient_basis, block.activation_basis, block.eigenvalues)


@pytest.mark.parametrize("ranks", [(2, 3), (6, 3), (None, 3), (2, 8), (2, None)], ids=str)
def test_the_quadratic_form_is_never_negative(ranks: tuple[int | None, int | None]) -> None:
    """Also where all but rounding errors is of eigenvalue zero, in single precision."""
    block = thin_block(SIZES, ranks, seed=2).map(torch.Tensor.float)
    values = torch.zeros_like(block.eigenvalues)
    for axis, thin in ((1, ranks[0] in (2,)), (2, ranks[1] == 3)):
        if thin:
            values.select(axis, -1).fill_(1.0)
    values[:, : ranks[0] if ranks[0] == 2 else None, : ranks[1] if ranks[1] == 3 else None] = 0.0
    block = block.with_eigenvalues(values)
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        kept = torch.randn(2, *block.ranks, generator=generator)
        if block.gradient_basis is not None:
            kept = block.gradient_basis @ kept
        if block.activation_basis is not None:
            kept = kept @ block.activation_basis.mT
        value = float(quadratic_form([block], {"w": kept.reshape(12, 8)}))
        assert 0.0 <= value <= 1e-5 * float(kept.square().sum())


@pytest.mark.parametrize("ranks", RANKS, ids=str)
def test_trace_and_partial_traces(ranks: tuple[int | None, int | None]) -> None:
    block = thin_block(SIZES, ranks, seed=3)
    dense = dense_groups(block, SIZES[1:])
    np.testing.assert_allclose(float(block.trace), sum(map(np.trace, dense)), rtol=1e-12)
    np.testing.assert_allclose(float(block.mean), np.mean([np.diag(d) for d in dense]), rtol=1e-12)
    rows, columns = block.multiplicities
    for group, matrix in enumerate(dense):
        sides = zip(
            partial_traces(matrix, SIZES[1:]),
            block.partial_traces,
            (rows, columns),
            (block.gradient_basis, block.activation_basis),
            SIZES[1:],
            strict=True,
        )
        for exact, own, counts, basis, size in sides:
            assert float(counts.sum()) == size
            vectors = np.eye(size) if basis is None else basis[group].numpy()
            kept = vectors.shape[1]
            diagonal = np.diag(vectors.T @ exact @ vectors)
            np.testing.assert_allclose(own[group, :kept].numpy(), diagonal, rtol=1e-10, atol=1e-12)
            rest = np.trace(exact) - diagonal.sum()
            of_complement = (counts * own[group])[kept:].sum()
            np.testing.assert_allclose(float(of_complement), rest, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("ranks", [(1, 1), (2, 2), (3, 4), (5, 7), (6, 8), (6, 1)], ids=str)
@pytest.mark.parametrize("before", [(6, 8), (5, 7), (None, 8), (6, None), (6, 4)], ids=str)
def test_cutting_leaves_exact_means(
    before: tuple[int | None, int | None], ranks: tuple[int, int]
) -> None:
    """Entry by entry, from the dense matrix before and the directions after."""
    block = thin_block(SIZES, before, seed=5)
    thin = cut(block, *ranks)
    expected = tuple(
        size if old is None else min(old, new)
        for old, new, size in zip(before, ranks, SIZES[1:], strict=True)
    )
    assert thin.ranks == expected
    for group, dense in enumerate(dense_groups(block, SIZES[1:])):
        left, right = (
            np.eye(size) if basis is None else basis[group].numpy()
            for basis, size in zip(
                (thin.gradient_basis, thin.activation_basis), SIZES[1:], strict=True
            )
        )
        sides = []
        for vectors in (left, right):
            own = [np.outer(v, v) for v in vectors.T]
            if vectors.shape[1] < len(vectors):
                own.append(np.eye(len(vectors)) - vectors @ vectors.T)
            sides.append(own)
        for i, p in enumerate(sides[0]):
            for j, q in enumerate(sides[1]):
                exact = np.trace(dense @ np.kron(p, q)) / np.trace(p) / np.trace(q)
                got = float(thin.eigenvalues[group, i, j])
                np.testing.assert_allclose(got, exact, rtol=1e-10, atol=1e-12)


def test_cutting_keeps_the_largest_partial_traces_in_order() -> None:
    values = torch.tensor([[[1.0, 0.0], [5.0, 0.0], [0.0, 2.0], [3.0, 1.0]]]).double()
    block = Block(("w",), orthonormal(1, 4, 4, 0), orthonormal(1, 2, 2, 1), values)
    thin = cut(block, 2, None)
    assert torch.equal(thin.gradient_basis, block.gradient_basis[:, :, [1, 3]])
    assert thin.activation_basis is block.activation_basis
    expected = torch.tensor([[[5.0, 0.0], [3.0, 1.0], [0.5, 1.0]]]).double()
    assert torch.equal(thin.eigenvalues, expected)


def test_cutting_in_two_steps_is_cutting_in_one() -> None:
    block = thin_block(SIZES, (6, 8), seed=7)
    twice, once = cut(cut(block, 4, 6), 2, 3), cut(block, 2, 3)
    assert torch.equal(twice.gradient_basis, once.gradient_basis)
    assert torch.equal(twice.activation_basis, once.activation_basis)
    torch.testing.assert_close(twice.eigenvalues, once.eigenvalues, rtol=1e-12, atol=1e-12)


def test_nothing_is_cut_that_is_thin_enough() -> None:
    for block in (thin_block(SIZES, (6, 8)), thin_block(SIZES, (2, None))):
        assert cut(block, None, None) is block
        assert cut(block, 6, 100) is block


def test_further_from_the_whole_the_fewer_are_kept() -> None:
    block = thin_block((1, 6, 8), (6, 8), seed=9)
    whole = dense_groups(block, (6, 8))[0]
    for side in range(2):
        distances = []
        for rank in range(1, 9 if side else 7):
            ranks = (None, rank) if side else (rank, None)
            distances.append(np.linalg.norm(dense_groups(cut(block, *ranks), (6, 8))[0] - whole))
        assert all(a >= b - 1e-12 for a, b in pairwise(distances))
        assert distances[0] > 0.1
        assert distances[-1] == 0


@pytest.mark.parametrize("ranks", [(0, None), (None, -1)])
def test_impossible_ranks_are_refused(ranks: tuple[int | None, int | None]) -> None:
    name = "gradient_rank is 0" if ranks[0] is not None else "activation_rank is -1"
    with pytest.raises(ValueError, match=f"^{name}; expected at least 1, or None"):
        cut(thin_block(SIZES, (6, 8)), *ranks)


def test_of_whole_blocks_the_spectrum_is_the_eigenvalues() -> None:
    block = thin_block(SIZES, (6, 8))
    assert block.spectrum is block.eigenvalues
    assert not block.is_thin
    assert not replace(block, gradient_basis=None).is_thin


def test_tensors_are_replaced_and_the_rest_follows() -> None:
    """What is derived from the bases is derived again from others."""
    block = thin_block(SIZES, (2, 3))
    tensors = {"w": torch.randn(SIZES, dtype=torch.float64).reshape(12, 8)}
    before = block.rotate(tensors)
    turned = replace(block, gradient_basis=orthonormal(2, 6, 2, 99))
    assert not torch.allclose(turned.rotate(tensors), before)
    single = block.map(torch.Tensor.float)
    assert single.rotate(tensors).dtype == torch.float32
    torch.testing.assert_close(single.rotate(tensors).double(), before, rtol=1e-5, atol=1e-5)
    doubled = block.with_eigenvalues(2 * block.eigenvalues)
    assert torch.equal(doubled.spectrum, 2 * block.spectrum)


def test_autocast_changes_nothing() -> None:
    block = thin_block(SIZES, (4, 6), seed=3).map(torch.Tensor.float)
    tensors = {"w": torch.randn(12, 8)}
    expected = [*cut(block, 2, 3).tensors.values(), *block.partial_traces, block.rotate(tensors)]
    expected += [quadratic_form([block], tensors), block.multiply(block.gather(tensors))]
    again = block.map(torch.clone)
    with torch.autocast("cpu", torch.bfloat16):
        found = [*cut(again, 2, 3).tensors.values(), *again.partial_traces, again.rotate(tensors)]
        found += [quadratic_form([again], tensors), again.multiply(again.gather(tensors))]
        found.append(again.trace)
    for one, other in zip([*expected, block.trace], found, strict=True):
        assert torch.equal(one, other)
