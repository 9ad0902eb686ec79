"""Bases kept in a smaller dtype, against polar factors from a singular value decomposition."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rotate_ewc import EKFACLinearOperator, merge
from rotate_ewc.linalg.block import Block, map_together
from rotate_ewc.linalg.quadratic import quadratic_form, quadratic_gradient
from rotate_ewc.linalg.storage import common_storage_dtype, stored_in
from rotate_ewc.provenance import Provenance
from tests.helpers.thin import dense_groups, thin_block

SMALL = [torch.bfloat16, torch.float16, torch.float32]
SIZES = (2, 9, 12)
RANKS: list[tuple[int | None, int | None]] = [
    (9, 12),
    (3, 4),
    (9, 2),
    (6, 12),
    (None, 5),
    (4, None),
]


def polar(block: Block) -> Block:
    """The block with the orthonormal matrices that are nearest to its bases, in float64."""

    def nearest(basis: Tensor | None) -> Tensor | None:
        if basis is None:
            return None
        left, _, right = torch.linalg.svd(basis.double(), full_matrices=False)
        return left @ right

    gradient, activation = nearest(block.gradient_basis), nearest(block.activation_basis)
    return replace(block, gradient_basis=gradient, activation_basis=activation)


def dense(block: Block) -> Tensor:
    """The matrix over the entries of the groups, one after the other."""
    return torch.block_diag(*map(torch.from_numpy, dense_groups(block, block.shape[1:])))


def stored(ranks: tuple[int | None, int | None], dtype: torch.dtype, **options: Any) -> Block:
    (block,) = stored_in([thin_block(SIZES, ranks, **options)], dtype)
    return block


def operator(block: Block) -> EKFACLinearOperator:
    provenance = Provenance("MSELoss", "mean", "type2", 10, 20.0)
    return EKFACLinearOperator.from_blocks([block], {"w": (18, 12)}, provenance)


@pytest.mark.parametrize("dtype", SMALL)
@pytest.mark.parametrize("ranks", RANKS)
def test_products_are_with_the_nearest_orthonormal_bases(
    ranks: tuple[int | None, int | None], dtype: torch.dtype
) -> None:
    block = stored(ranks, dtype)
    assert block.storage_dtype == dtype
    matrix = dense(polar(block))
    torch.manual_seed(0)
    vector = torch.randn(18, 12, dtype=torch.float64, requires_grad=True)
    expected = matrix @ vector.flatten()
    # Two steps leave the fourth power of the rounding of bfloat16.
    tolerance = {"rtol": 0.0, "atol": 1e-8}
    value = quadratic_form([block], {"w": vector})
    torch.testing.assert_close(value, vector.flatten() @ expected, rtol=1e-8, atol=0.0)
    (gradient,) = torch.autograd.grad(value, vector, create_graph=True)
    torch.testing.assert_close(gradient.flatten(), 2 * expected, **tolerance)
    (second,) = torch.autograd.grad(gradient.sum(), vector)
    torch.testing.assert_close(second.flatten(), 2 * matrix.sum(dim=0), **tolerance)
    product = quadratic_gradient([block], {"w": vector.detach()})["w"]
    torch.testing.assert_close(product.flatten(), expected.detach(), **tolerance)
    fisher = operator(block)
    torch.testing.assert_close(fisher.to_dense(), matrix, **tolerance)
    torch.testing.assert_close(fisher.diagonal()[0].flatten(), matrix.diagonal(), **tolerance)
    damped = matrix + 0.1 * torch.eye(len(matrix), dtype=torch.float64)
    inverse = torch.linalg.inv(damped)
    torch.testing.assert_close(fisher.inverse(damping=0.1).to_dense(), inverse, **tolerance)
    log_det = torch.logdet(damped).item()
    assert fisher.damped(0.1).logdet.item() == pytest.approx(log_det, rel=1e-9)


@pytest.mark.parametrize("dtype", SMALL)
@pytest.mark.parametrize("ranks", RANKS)
def test_the_trace_is_exact_and_nothing_is_negative(
    ranks: tuple[int | None, int | None], dtype: torch.dtype
) -> None:
    whole = thin_block(SIZES, ranks)
    (block,) = stored_in([whole], dtype)
    exact, matrix = dense(whole), operator(block).to_dense()
    assert torch.equal(block.eigenvalues, whole.eigenvalues)
    assert matrix.trace().item() == pytest.approx(exact.trace().item(), rel=1e-9)
    smallest = torch.linalg.eigvalsh(matrix)[0].item()
    assert smallest > -1e-9 * torch.linalg.matrix_norm(exact, 2).item()
    error = torch.linalg.matrix_norm(matrix - exact) / torch.linalg.matrix_norm(exact)
    unit = torch.finfo(dtype).eps
    assert 0.01 * unit < error < unit


@pytest.mark.parametrize("ranks", RANKS)
def test_coordinates_are_in_an_orthogonal_basis(ranks: tuple[int | None, int | None]) -> None:
    block = stored(ranks, torch.bfloat16)
    torch.manual_seed(1)
    vector = torch.randn(18, 12, dtype=torch.float64)
    rotated = block.rotate({"w": vector})
    assert rotated.norm().item() == pytest.approx(vector.norm().item(), rel=1e-9)
    back = block.unrotate(rotated, {"w": vector.shape})["w"]
    torch.testing.assert_close(back, vector, rtol=0.0, atol=1e-8)
    product = block.unrotate(block.spectrum * rotated, {"w": vector.shape})["w"]
    expected = dense(polar(block)) @ vector.flatten()
    torch.testing.assert_close(product.flatten(), expected, rtol=0.0, atol=1e-8)


def test_nothing_in_the_larger_dtype_outlives_a_product() -> None:
    block = stored((3, 4), torch.bfloat16)
    block.prepare()
    vector = {"w": torch.randn(18, 12, dtype=torch.float64)}
    block.rotate(vector)
    quadratic_form([block], vector)
    kept = {name for name in vars(block) if isinstance(vars(block)[name], Tensor)}
    assert kept == {"eigenvalues", "gradient_basis", "activation_basis"}
    assert not {"products", "_completed", "_rotations", "_spread"} & set(vars(block))
    with pytest.raises(RuntimeError, match="the bases of 'w' are to be restored first"):
        _ = block.products


def test_regular_blocks_are_left_as_they_are() -> None:
    block = thin_block(SIZES, (3, 4))
    assert block.restored is block
    assert block.storage_dtype is None
    assert stored_in([block], None) == (block,)
    (same,) = stored_in([block], torch.float64)
    assert same.gradient_basis is block.gradient_basis
    (identity,) = stored_in([thin_block(SIZES, (None, None))], torch.bfloat16)
    assert identity.storage_dtype is None
    assert common_storage_dtype([identity]) is None


def test_other_dtypes_and_back() -> None:
    whole = thin_block(SIZES, (3, 12))
    (low,) = stored_in([whole], torch.bfloat16)
    (back,) = stored_in([low], torch.float64)
    assert back.storage_dtype is None
    torch.testing.assert_close(dense(back), dense(polar(low)), rtol=0.0, atol=1e-8)
    (single,) = stored_in([back], torch.float32)
    assert single.storage_dtype == torch.float32
    assert common_storage_dtype([low, single]) == torch.float32
    fisher = operator(whole).to(storage_dtype="bfloat16")
    assert fisher.block("w").storage_dtype == torch.bfloat16
    moved = fisher.to(dtype=torch.float32)
    assert moved.block("w").storage_dtype == torch.bfloat16
    assert moved.dtype == torch.float32
    torch.testing.assert_close(moved.to_dense().double(), fisher.to_dense(), rtol=0.0, atol=1e-5)
    with pytest.raises(ValueError, match=r"storage_dtype is torch\.int8; expected one of float32"):
        fisher.to(storage_dtype=torch.int8)


def test_what_is_shared_stays_shared() -> None:
    first = thin_block(SIZES, (3, 4), parameters=("w",))
    second = replace(first, parameters=("v",))
    low = stored_in([first, second], torch.bfloat16)
    assert low[0].activation_basis is low[1].activation_basis
    cast = map_together(lambda tensor: tensor.to(torch.float32), low)
    assert cast[0].activation_basis is cast[1].activation_basis
    assert cast[0].activation_basis is not None
    assert cast[0].activation_basis.dtype == torch.bfloat16
    assert cast[0].eigenvalues.dtype == torch.float32


@pytest.mark.parametrize("ranks", [(3, 4), (9, 12)])
def test_merging_has_the_exact_trace_and_the_most_precise_storage(ranks: tuple[int, int]) -> None:
    low = stored(ranks, torch.bfloat16)
    (half,) = stored_in([thin_block(SIZES, ranks, seed=5)], torch.float16)
    merged = merge([operator(low), operator(low)], [1.0, 2.0]).block("w")
    assert merged.storage_dtype == torch.bfloat16
    error = dense(polar(merged)) - 3 * dense(polar(low))
    assert error.norm() < 2**-7 * 3 * dense(low).norm()
    mixed = merge([operator(low), operator(half)]).block("w")
    assert mixed.storage_dtype == torch.float32
    expected = low.trace + half.trace
    torch.testing.assert_close(mixed.trace, expected, rtol=1e-8, atol=0.0)
    total = dense(polar(low)) + dense(polar(half))
    outputs = np.einsum("gaibi->gab", _groups(total.numpy()))
    of_basis = polar(mixed).gradient_basis
    assert of_basis is not None
    found = torch.einsum("gak,gab,gbk->gk", of_basis, torch.from_numpy(outputs), of_basis)
    traces = mixed.partial_traces[0][:, : found.shape[1]]
    torch.testing.assert_close(traces, found, rtol=1e-5, atol=1e-6)
    whole = merge([operator(low), operator(thin_block(SIZES, ranks))]).block("w")
    assert whole.storage_dtype is None


def _groups(matrix: np.ndarray) -> np.ndarray:
    """Each group's own square, by its two axes of rows and of columns."""
    groups, d_out, d_in = SIZES
    split = matrix.reshape(groups, d_out, d_in, groups, d_out, d_in)
    return np.stack([split[g, :, :, g] for g in range(groups)])
