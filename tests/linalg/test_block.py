"""Blocks: how parameters become a matrix and back, one of each or several, and what they show."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rotate_ewc.linalg.block import Block, matrix_shape
from tests.helpers.random_operators import Layout

LAYOUTS = [
    Layout(groups, d_out, 4, transposed=transposed, joint=joint, bases="both", form=form)
    for groups, d_out, form in ((1, 3, 0), (2, 3, 1))
    for transposed in (False, True)
    for joint in (False, True)
]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def block_of(layout: Layout) -> Block:
    return layout.block(0, torch.Generator().manual_seed(1), "positive")


def matrix_by_loops(layout: Layout, tensors: dict[str, Tensor]) -> Tensor:
    """`[bias | weight]`, entry by entry, from how the parameters are stored."""
    weight, *biases = (tensors[name].flatten() for name in layout.names(0))
    matrix = torch.zeros(layout.groups, layout.d_out, layout.d_in, dtype=torch.float64)
    for group in range(layout.groups):
        for row in range(layout.d_out):
            for bias in biases:
                matrix[group, row, 0] = bias[group * layout.d_out + row]
            for column in range(layout.columns):
                place = (group * layout.d_out + row) * layout.columns + column
                if layout.transposed:
                    place = (group * layout.columns + column) * layout.d_out + row
                matrix[group, row, column + layout.joint] = weight[place]
    return matrix


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_parameters_as_a_matrix_and_back(layout: Layout) -> None:
    block, shapes = block_of(layout), layout.shapes(0)
    tensors = {name: drawn(*shape, seed=len(name + str(shape))) for name, shape in shapes.items()}
    matrix = block.gather(tensors)
    assert torch.equal(matrix, matrix_by_loops(layout, tensors))
    back = block.split(matrix, shapes)
    assert set(back) == set(tensors)
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("count", [0, 1, 5])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_several_of_each_parameter(layout: Layout, count: int) -> None:
    """Gathered, rotated and back, they are what each is by itself, rotated by plain sums."""
    block, shapes = block_of(layout), layout.shapes(0)
    tensors = {n: drawn(count, *shape, seed=len(shape)) for n, shape in shapes.items()}
    each = [{name: tensor[k] for name, tensor in tensors.items()} for k in range(count)]
    expected = torch.zeros(count, *block.eigenvalues.shape, dtype=torch.float64)
    for k, one in enumerate(each):
        expected[k] = matrix_by_loops(layout, one)
    gathered = block.gather(tensors, columns=True)
    assert torch.equal(gathered, expected)
    rotated = block.rotate(tensors, columns=True)
    by_sums = torch.einsum(
        "goi,kgoj,gjl->kgil", block.gradient_basis, expected, block.activation_basis
    )
    torch.testing.assert_close(rotated, by_sums, rtol=1e-12, atol=1e-12)
    for back in (block.split(gathered, shapes), block.unrotate(rotated, shapes)):
        for name, tensor in tensors.items():
            torch.testing.assert_close(back[name], tensor, rtol=1e-12, atol=1e-12)


def test_products_are_in_the_dtype_of_the_eigenvalues() -> None:
    layout = LAYOUTS[1]
    tensors = {name: drawn(*shape).float() for name, shape in layout.shapes(0).items()}
    assert block_of(layout).rotate(tensors).dtype == torch.float64


def test_label_names_all_parameters() -> None:
    plain, joint = (block_of(layout) for layout in LAYOUTS[:2])
    assert (plain.label, joint.label) == ("w0", "w0+b0")


@pytest.mark.parametrize(
    ("shape", "groups", "transposed", "expected"),
    [
        ((), 1, False, (1, 1, 1)),  # a scalar
        ((), 1, True, (1, 1, 1)),
        ((5,), 1, False, (1, 5, 1)),
        ((6, 4), 1, False, (1, 6, 4)),
        ((6, 4, 3, 3), 2, False, (2, 3, 36)),
        ((6, 4, 3, 3), 2, True, (2, 36, 3)),  # inputs come first
        ((0, 4), 1, False, (1, 0, 0)),  # nothing
    ],
)
def test_shape_of_the_matrix(
    shape: tuple[int, ...], groups: int, transposed: bool, expected: tuple[int, int, int]
) -> None:
    assert matrix_shape(torch.Size(shape), groups, transposed) == expected
