"""The oracles of layers and blocks; the library takes no part in this."""

from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import oracles
from tests.helpers.cases import (
    BY_NAME,
    CASES,
    UNSHARED,
    Case,
    terms_of,
)
from tests.helpers.oracles import (
    Approximation,
    BlockLayout,
    Fisher,
    block_indices,
    block_matrix,
    dense_block,
    dense_fisher,
    dense_ggn,
    dense_operator,
    evaluation_copy,
    exact_blocks,
    expected_layouts,
    in_own_basis,
    kfac_matrix,
    output_hook,
    parameter_shapes,
    partial_traces,
    unfold_input,
    unfold_output,
)
from tests.helpers.oracles.blocks import MATRIX_LAYERS, TRANSPOSED_CONVOLUTIONS

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")

# The last layer of `nn.MultiheadAttention`, which uses its weight without calling it.
UNCALLED = nn.modules.linear.NonDynamicallyQuantizableLinear
FISHERS: tuple[Fisher, ...] = ("type2", "empirical")

assert_close = partial(oracles.assert_close, tolerance=1e-12)


@dataclass(frozen=True)
class FakeBlock:
    """A block made by hand."""

    parameters: tuple[str, ...]
    gradient_basis: Tensor | None
    activation_basis: Tensor | None
    eigenvalues: Tensor
    transposed: bool = False


def orthogonal(*shape: int) -> Tensor:
    """Return seeded orthogonal matrices."""
    generator = torch.Generator().manual_seed(0)
    basis: Tensor
    basis, _ = torch.linalg.qr(torch.randn(shape, generator=generator, dtype=torch.float64))
    return basis


# --------------------------------------------------------------------------- layout


def test_block_indices_put_the_bias_first() -> None:
    """Grouped joint layout, written out by hand."""
    shapes = {"other": (2,), "w": (4, 1, 2), "b": (4,)}
    expected = torch.tensor([[[10, 2, 3], [11, 4, 5]], [[12, 6, 7], [13, 8, 9]]])
    assert torch.equal(block_indices(shapes, ("w", "b"), 2), expected)
    assert torch.equal(block_indices(shapes, ("b",), 2), torch.tensor([[[10], [11]], [[12], [13]]]))
    assert torch.equal(block_indices(shapes, ("w",), 1), torch.arange(2, 10).reshape(1, 4, 2))


def test_block_indices_of_transposed_weights() -> None:
    """Rows of the parameter are then columns of the matrix, group by group."""
    shapes = {"b": (2,), "w": (4, 1, 2), "s": ()}
    expected = torch.tensor([[[2, 4], [3, 5]], [[6, 8], [7, 9]]])
    assert torch.equal(block_indices(shapes, ("w",), 2, transposed=True), expected)
    joint = torch.tensor([[[0, 2, 4, 6, 8], [1, 3, 5, 7, 9]]])
    assert torch.equal(block_indices(shapes, ("w", "b"), 1, transposed=True), joint)
    assert torch.equal(block_indices(shapes, ("s",)), torch.tensor([[[10]]]))


def test_dense_block_acts_on_row_major_matrices() -> None:
    """``(Q_g (x) Q_a) diag(L) (Q_g (x) Q_a)^T vec(V) = vec(Q_g (L * Q_g^T V Q_a) Q_a^T)``."""
    q_g, q_a = orthogonal(2, 3, 3), orthogonal(2, 4, 4)
    eigenvalues = torch.arange(24, dtype=torch.float64).reshape(2, 3, 4)
    v = torch.sin(torch.arange(24, dtype=torch.float64)).reshape(2, 3, 4)
    eye3, eye4 = torch.eye(3, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
    for gradient_basis, activation_basis in [(q_g, q_a), (None, q_a), (q_g, None), (None, None)]:
        block = FakeBlock(("w",), gradient_basis, activation_basis, eigenvalues)
        left = q_g if gradient_basis is not None else eye3.expand(2, 3, 3)
        right = q_a if activation_basis is not None else eye4.expand(2, 4, 4)
        expected = left @ (eigenvalues * (left.mT @ v @ right)) @ right.mT
        actual = (dense_block(block) @ v.flatten(start_dim=1)[..., None]).reshape(2, 3, 4)
        assert_close(actual, expected)


def test_dense_operator_inverts_block_matrix() -> None:
    """Diagonalising every exact block and scattering it back gives the block diagonal."""
    case = BY_NAME["conv2d-stride-groups"]
    model = case.model()
    shapes = parameter_shapes(model, case.names(model))
    size = sum(prod(shape) for shape in shapes.values())
    matrix = torch.randn(size, size, generator=torch.Generator().manual_seed(5)).double()
    layouts = expected_layouts(model, list(shapes), joint=True)
    assert [layout.groups for layout in layouts] == [2, 1]
    blocks = []
    for names, exact in exact_blocks(matrix, shapes, layouts).items():
        groups, entries, _ = exact.shape
        d_out = shapes[names[0]][0] // groups
        diagonal = exact.diagonal(dim1=1, dim2=2).reshape(groups, d_out, entries // d_out)
        blocks.append(FakeBlock(names, None, None, diagonal))
    assert_close(dense_operator(blocks, shapes), torch.diag(matrix.diagonal()))


def test_diagonal_in_the_own_basis_undoes_a_dense_block() -> None:
    """The eigenvalues come back, whatever is added off the diagonal."""
    eigenvalues = torch.arange(24, dtype=torch.float64).reshape(2, 3, 4)
    block = FakeBlock(("w",), orthogonal(2, 3, 3), orthogonal(2, 4, 4), eigenvalues)
    assert_close(in_own_basis(block, dense_block(block)), eigenvalues)


def test_partial_traces_are_sums_of_squares() -> None:
    """``G G^T`` and ``G^T G``, summed over the gradients whose outer products make the block."""
    gradients = torch.sin(torch.arange(5 * 2 * 3 * 4, dtype=torch.float64)).reshape(5, 2, 3, 4)
    flat = gradients.flatten(start_dim=2)
    left, right = partial_traces(torch.einsum("ngi,ngj->gij", flat, flat), 3)
    assert_close(left, (gradients @ gradients.mT).sum(dim=0))
    assert_close(right, (gradients.mT @ gradients).sum(dim=0))


def test_layouts_keep_weight_and_bias_apart_or_together() -> None:
    """Joint blocks only where both parameters are estimated."""
    case = BY_NAME["subset-of-parameters"]
    model = case.model()
    names = case.names(model)
    apart = [layout.parameters for layout in expected_layouts(model, names, joint=False)]
    together = [layout.parameters for layout in expected_layouts(model, names, joint=True)]
    assert apart == [("2.weight",), ("4.bias",), ("6.weight",), ("6.bias",)]
    assert together == [("2.weight",), ("4.bias",), ("6.weight", "6.bias")]


def test_layouts_that_are_given_come_before_those_of_modules() -> None:
    """A module's bias is still known where its weight has another use; names decide."""
    model = nn.Sequential(nn.Linear(2, 3), nn.ConvTranspose1d(4, 6, 2, groups=2))
    names = [name for name, _ in model.named_parameters()]
    given = (BlockLayout(("0.weight",), kind="derived"),)
    assert expected_layouts(model, names, joint=True, given=given) == [
        BlockLayout(("0.weight",), kind="derived"),
        BlockLayout(("0.bias",), kind="bias"),
        BlockLayout(("1.weight",), 2, transposed=True),
        BlockLayout(("1.bias",), 2, kind="bias"),
    ]


# --------------------------------------------------------------------------- layer terms


@pytest.mark.parametrize("case", CASES, ids=str)
def test_unfolded_layers_are_matrix_products(case: Case) -> None:
    """A layer's output in any direction, from its unfolded input, its weight and its bias."""
    model = evaluation_copy(case.model())
    kinds = (*MATRIX_LAYERS, *TRANSPOSED_CONVOLUTIONS, nn.Embedding)
    layers = [module for module in model.modules() if isinstance(module, kinds)]
    seen = set()

    def check(module: Any, args: tuple[Tensor], z: Tensor) -> None:
        a = unfold_input(module, args[0])
        direction = torch.sin(torch.arange(z.numel()).double()).reshape(z.shape)
        unfolded = unfold_output(module, direction)
        weight = module.weight.reshape(a.shape[2], -1, *module.weight.shape[1:]).flatten(2)
        weight = weight if isinstance(module, MATRIX_LAYERS) else weight.mT
        products = torch.einsum("nsgi,goi,nsgo->", a, weight, unfolded)
        if (bias := getattr(module, "bias", None)) is not None:
            axis = -1 if isinstance(module, nn.Linear) else 1
            products = products + (direction.movedim(axis, -1) * bias).sum()
        if getattr(module, "padding_idx", None) is not None:
            z = z * (args[0] != module.padding_idx)[..., None]
        assert_close(products, (z * direction).sum())
        seen.add(module)

    with torch.no_grad(), output_hook(layers, check):
        model(case.inputs())
    unseen = {*layers} - seen
    assert all(isinstance(module, UNCALLED) for module in unseen) or "functional" in case.name


@pytest.mark.parametrize("case", [case for case in CASES if case.reference is not None], ids=str)
def test_references_compute_the_same(case: Case) -> None:
    """What takes a model's place to show its layers has the same outputs and parameters."""
    model = evaluation_copy(case.model())
    assert case.reference is not None
    reference = case.reference(model).eval()
    with torch.no_grad():
        assert_close(reference(case.inputs()), model(case.inputs()))
    total = sum(parameter.numel() for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in reference.parameters()) == total


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("case", UNSHARED, ids=str)
def test_kfac_is_exact_for_one_unshared_example(case: Case, approximation: Approximation) -> None:
    """With one example and one position the Fisher block is a Kronecker product."""
    case = replace(case, batch_sizes=(1,))
    model, x, y = case.model(), case.inputs(), case.targets("ce")
    names = case.names(model)
    shapes = parameter_shapes(model, names)
    dense = dense_ggn(model, nn.CrossEntropyLoss(), names, x, y)
    for layout in expected_layouts(model, names, joint=True, given=case.layouts):
        if layout.kind not in ("layer", "lookup"):
            continue
        terms = terms_of(case, "ce", "mean", "type2", layout.parameters)
        if terms is not None:
            exact = block_matrix(dense, shapes, layout.parameters, 1, layout.transposed)
            assert_close(kfac_matrix(terms, approximation), exact)


def test_flattened_sequences_are_sequences() -> None:
    """``[N * T, C]`` and ``[N, C, T]`` are the same outputs, without cross-terms of positions."""
    flat, channels = BY_NAME["flattened-sequence-outputs"], BY_NAME["sequence-outputs"]
    x, y = flat.inputs(), flat.targets("ce")
    names = flat.names(flat.model())
    for fisher in FISHERS:
        expected = dense_fisher(
            channels.model(), nn.CrossEntropyLoss(), names, x, y.reshape(len(x), 2), fisher
        )
        actual = dense_fisher(flat.model(), nn.CrossEntropyLoss(), names, x, y, fisher)
        assert_close(actual, expected)


def test_kfac_of_linear_regression() -> None:
    """For linear regression KFAC is exact with any number of examples."""
    case, names = BY_NAME["single-linear"], ("0.weight", "0.bias")
    model = case.model()
    dense = dense_ggn(model, nn.MSELoss(), names, case.inputs(), case.targets("mse"))
    terms = terms_of(case, "mse", "mean", "type2", names)
    assert terms is not None
    exact = block_matrix(dense, parameter_shapes(model, names), names)
    assert_close(kfac_matrix(terms, "expand"), exact)


def test_reduce_and_expand_differ_on_shared_positions() -> None:
    """Averaging positions first is another matrix, and exact for pooled linear models."""
    case = BY_NAME["pooled-linear"]
    model, x, y = case.model(), case.inputs(), case.targets("mse")
    names = case.names(model)
    shapes = parameter_shapes(model, names)
    dense = dense_ggn(model, nn.MSELoss(), names, x, y)
    for name in ("0.weight", "1.weight"):
        exact = block_matrix(dense, shapes, (name,))
        terms = terms_of(case, "mse", "mean", "type2", (name,))
        assert terms is not None
        assert_close(kfac_matrix(terms, "reduce"), exact)
        assert (kfac_matrix(terms, "expand") - exact).norm() > 0.1 * exact.norm()
