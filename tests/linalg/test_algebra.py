"""What is computed of lists of blocks: dense matrices, draws written out, and messages in full."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rotate_ewc.linalg import algebra
from rotate_ewc.linalg.block import Block
from tests.helpers.oracles import assert_close, dense_block
from tests.helpers.thin import completed, spread, thin_block

SHAPES = {"w": torch.Size((3, 4)), "e": torch.Size((5, 2))}


def blocks(rank: int = 3) -> list[Block]:
    """One with its parameter as it is stored, one transposed in single precision."""
    second = thin_block((1, 2, 5), (2, 5), seed=7, parameters=("e",), transposed=True)
    return [thin_block((1, 3, 4), (3, rank), seed=1), second.map(Tensor.float)]


def dense(block: Block) -> Tensor:
    """Over the entries of the parameter as it is stored."""
    matrix = dense_block(block)[0]
    if not block.transposed:
        return matrix
    _, d_out, d_in = block.shape
    return matrix.reshape(d_out, d_in, d_out, d_in).permute(1, 0, 3, 2).reshape(matrix.shape)


def random(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("rank", [2, 4])
def test_products_in_the_dtype_of_each_block(rank: int) -> None:
    columns = {"w": random(1, 6, 3, 4).float(), "e": random(2, 6, 5, 2)}
    product = algebra.multiply(blocks(rank), columns)
    assert list(product) == ["w", "e"]
    for (name, given), block in zip(columns.items(), blocks(rank), strict=True):
        assert product[name].dtype == given.dtype
        assert product[name].shape == given.shape
        expected = given.flatten(1).double() @ dense(block).double()
        assert_close(product[name].flatten(1).double(), expected, 1e-6)


@pytest.mark.parametrize("rank", [2, 4])
def test_diagonal_over_the_parameters(rank: int) -> None:
    found = algebra.diagonal(blocks(rank), SHAPES)
    assert list(found) == ["w", "e"]
    for block, (name, shape) in zip(blocks(rank), SHAPES.items(), strict=True):
        assert found[name].shape == shape
        assert_close(found[name].flatten(), dense(block).diagonal(), 1e-6)


@pytest.mark.parametrize("rank", [2, 4])
def test_draws_are_noise_in_the_eigenbasis(rank: int) -> None:
    """Of the same generator; thin bases have the eigenvalue of the rest in many places."""
    given = blocks(rank)
    with torch.device("meta"):  # where nothing of the blocks is
        draws = algebra.sample(given, SHAPES, 3, torch.Generator("cpu").manual_seed(5))
    assert {name: draw.shape for name, draw in draws.items()} == {"w": (3, 3, 4), "e": (3, 5, 2)}
    generator = torch.Generator().manual_seed(5)
    for block, draw in zip(blocks(rank), draws.values(), strict=True):
        shape = (3, *block.shape)
        noise = torch.randn(shape, generator=generator, dtype=block.eigenvalues.dtype)
        (left,), (right,) = completed(block, 0), completed(block, 1)
        for one, own in zip(draw, noise[:, 0].double().numpy(), strict=True):
            expected = torch.from_numpy(left @ (spread(block, 0) * own) @ right.T)
            assert_close(one.double(), expected.T if block.transposed else expected, 1e-6)
        assert draw.dtype == block.eigenvalues.dtype
    torch.manual_seed(5)
    globally = algebra.sample(blocks(rank), SHAPES, 3, None)
    assert all(torch.equal(globally[name], draw) for name, draw in draws.items())


def test_functions_get_a_copy_of_the_eigenvalues() -> None:
    given = blocks()
    before = [block.eigenvalues.clone() for block in given]
    found = algebra.apply(lambda values: values.mul_(3.0).add_(1.0), given)
    for new, old, values in zip(found, given, before, strict=True):
        assert torch.equal(old.eigenvalues, values)
        assert torch.equal(new.eigenvalues, values * 3.0 + 1.0)
        assert new.parameters == old.parameters
        assert new.gradient_basis is old.gradient_basis


WHAT = "the function of the eigenvalues of 'w+b' returned "
NEITHER = (
    "values that are negative or not finite; expected finite ones of at least 0 (add damping "
    "first?)"
)


@pytest.mark.parametrize(
    ("function", "kind", "message"),
    [
        (lambda _: 3, TypeError, WHAT + "int; expected a tensor"),
        (Tensor.float, ValueError, WHAT + "dtype torch.float32; expected torch.float64"),
        (lambda v: v[0], ValueError, WHAT + "shape [3, 4]; expected [1, 3, 4]"),
        (lambda v: v - v.max(), ValueError, WHAT + NEITHER),
        (lambda v: v / 0.0, ValueError, WHAT + NEITHER),
        (lambda v: 0.0 * v / 0.0, ValueError, WHAT + NEITHER),
        (3, TypeError, "function is 3; expected a function from tensor to tensor"),
    ],
)
def test_functions_that_are_none_of_positive_matrices(
    function: Callable[[Any], Any], kind: type[Exception], message: str
) -> None:
    joint = replace(blocks(4)[0], parameters=("w", "b"))
    with pytest.raises(kind) as raised:
        algebra.apply(function, [joint])
    assert str(raised.value) == message
    assert not algebra.apply(torch.zeros_like, [joint])[0].eigenvalues.any()


def test_singular_blocks_are_named() -> None:
    one, other = (block.with_eigenvalues(block.eigenvalues + 1.0) for block in blocks())
    algebra.check_positive([one, other], 0.0)
    values = other.eigenvalues.clone()
    values[0, 0, 0] = 0.0
    with pytest.raises(ValueError, match="singular") as raised:
        algebra.check_positive([one, other.with_eigenvalues(values)], 0.5)
    assert str(raised.value) == (
        "damping is 0.5, but the block of 'e' is singular; expected damping greater than 0"
    )
