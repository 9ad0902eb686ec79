"""The oracles against closed forms and finite differences; the library takes no part in this."""

from dataclasses import dataclass
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from tests.cases import BY_NAME, CASES, LOSSES, UNSHARED, Case
from tests.oracles import (
    Approximation,
    Fisher,
    block_indices,
    block_matrix,
    by_example,
    dense_block,
    dense_empirical_fisher,
    dense_fisher,
    dense_ggn,
    dense_operator,
    evaluation_copy,
    exact_blocks,
    example_gradient,
    example_jacobian,
    expected_layouts,
    kfac_matrix,
    layer_terms,
    mean_divisor,
    output_hook,
    parameter_shapes,
    unfold_input,
    unfold_output,
)

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")

FISHERS: tuple[Fisher, ...] = ("type2", "empirical")
REDUCTIONS = ("mean", "sum")
EYE3 = torch.eye(3, dtype=torch.float64)


@dataclass(frozen=True)
class FakeBlock:
    """A block made by hand."""

    parameters: tuple[str, ...]
    gradient_basis: Tensor | None
    activation_basis: Tensor | None
    eigenvalues: Tensor


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    """Compare relative to the largest entry that is expected."""
    assert actual.shape == expected.shape
    assert expected.abs().max() > 0
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def linear_problem() -> tuple[nn.Module, Tensor, Tensor]:
    """One Linear layer 4 -> 3, its inputs and, with a leading 1, its extended inputs."""
    case = BY_NAME["single-linear"]
    x = case.inputs()
    return case.model(), x, torch.cat([torch.ones_like(x[:, :1]), x], dim=1)


def joint_block(dense: Tensor, model: nn.Module) -> Tensor:
    """Cut the weight-and-bias block out of a one-layer model's matrix."""
    return block_matrix(dense, parameter_shapes(model, NAMES), NAMES)[0]


NAMES = ("0.weight", "0.bias")


def orthogonal(*shape: int) -> Tensor:
    """Return seeded orthogonal matrices."""
    generator = torch.Generator().manual_seed(0)
    basis: Tensor
    basis, _ = torch.linalg.qr(torch.randn(shape, generator=generator, dtype=torch.float64))
    return basis


# --------------------------------------------------------------------------- closed forms


def test_linear_regression() -> None:
    """For the squared error of a linear model the matrix is ``2 I (x) sum x x^T``."""
    model, x, extended = linear_problem()
    y = BY_NAME["single-linear"].targets("mse")
    expected = 2 * torch.kron(EYE3, extended.T @ extended)
    summed = dense_ggn(model, nn.MSELoss(reduction="sum"), NAMES, x, y)
    averaged = dense_ggn(model, nn.MSELoss(), NAMES, x, y)
    assert_close(joint_block(summed, model), expected)
    assert_close(joint_block(averaged, model), expected / y.numel())


def test_logistic_regression() -> None:
    """Independent sigmoids give one weighted covariance per output."""
    model, x, extended = linear_problem()
    y = BY_NAME["single-linear"].targets("bce")
    p = torch.sigmoid(model(x)).detach()
    covariances = [
        torch.einsum("n,ni,nj->ij", p[:, c] * (1 - p[:, c]), extended, extended) for c in range(3)
    ]
    expected = torch.zeros(15, 15, dtype=torch.float64)
    for c, covariance in enumerate(covariances):
        expected[5 * c : 5 * c + 5, 5 * c : 5 * c + 5] = covariance
    summed = dense_ggn(model, nn.BCEWithLogitsLoss(reduction="sum"), NAMES, x, y)
    averaged = dense_ggn(model, nn.BCEWithLogitsLoss(), NAMES, x, y)
    assert_close(joint_block(summed, model), expected)
    assert_close(joint_block(averaged, model), expected / y.numel())


def test_softmax_regression() -> None:
    """Cross entropy gives ``sum (diag(p) - p p^T) (x) x x^T``."""
    model, x, extended = linear_problem()
    y = BY_NAME["single-linear"].targets("ce")
    p = torch.softmax(model(x), dim=1).detach()
    terms = [
        torch.kron(torch.diag(p_n) - torch.outer(p_n, p_n), torch.outer(a_n, a_n))
        for p_n, a_n in zip(p, extended, strict=True)
    ]
    expected = torch.stack(terms).sum(dim=0)
    summed = dense_ggn(model, nn.CrossEntropyLoss(reduction="sum"), NAMES, x, y)
    averaged = dense_ggn(model, nn.CrossEntropyLoss(), NAMES, x, y)
    assert_close(joint_block(summed, model), expected)
    assert_close(joint_block(averaged, model), expected / len(x))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("loss", LOSSES)
def test_empirical_closed_form(loss: str, reduction: str) -> None:
    """Per-example gradients of one layer are the residual times the input."""
    model, x, extended = linear_problem()
    y = BY_NAME["single-linear"].targets(loss)
    f = model(x).detach()
    residual = {
        "ce": lambda: f.softmax(dim=1) - nn.functional.one_hot(y, 3) if loss == "ce" else f,
        "mse": lambda: 2 * (f - y),
        "bce": lambda: f.sigmoid() - y,
    }[loss]()
    if reduction == "mean" and loss != "ce":
        residual = residual / 3
    gradients = torch.einsum("no,ni->noi", residual, extended).flatten(start_dim=1)
    expected = gradients.T @ gradients
    expected = expected / len(x) if reduction == "mean" else expected
    dense = dense_empirical_fisher(model, LOSSES[loss](reduction=reduction), NAMES, x, y)
    assert_close(joint_block(dense, model), expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", ["single-linear", "conv", "tokens"])
def test_linear_in_parameters_means_hessian(name: str, loss: str, reduction: str) -> None:
    """For a model linear in its parameters the GGN is the Hessian of the loss."""
    case = {
        "single-linear": BY_NAME["single-linear"],
        "conv": Case(
            "conv",
            lambda: nn.Sequential(nn.Conv2d(2, 2, 2, padding=1, groups=2), nn.Flatten(2)),
            (2, 2, 2),
            (2, 9),
        ),
        "tokens": Case("tokens", lambda: nn.Linear(3, 2), (2, 3), (2, 2)),
    }[name]
    model, x, y = case.model(), case.inputs(), case.targets(loss)
    loss_func = LOSSES[loss](reduction=reduction)
    shapes = parameter_shapes(model, case.names(model))
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])

    def loss_of(theta: Tensor) -> Tensor:
        pieces = torch.split(theta, [prod(shape) for shape in shapes.values()])
        values = {n: p.reshape(s) for (n, s), p in zip(shapes.items(), pieces, strict=True)}
        value: Tensor = loss_func(functional_call(model, values, (x,)), y)
        return value

    assert_close(dense_ggn(model, loss_func, list(shapes), x, y), jacrev(jacrev(loss_of))(flat))


# --------------------------------------------------------------------------- identities


@pytest.mark.parametrize("case", CASES, ids=str)
def test_jacobian_against_finite_differences(case: Case) -> None:
    """Central differences along a random direction."""
    model = evaluation_copy(case.model())
    names = case.names(model)
    x = case.inputs()[:1]
    generator = torch.Generator().manual_seed(4)
    directions = {
        name: torch.randn(p.shape, generator=generator, dtype=p.dtype)
        for name, p in model.named_parameters()
        if name in names
    }
    step = 1e-6

    def moved(sign: int) -> Tensor:
        parameters = dict(model.named_parameters())
        values = {n: parameters[n].detach() + sign * step * d for n, d in directions.items()}
        output: Tensor = functional_call(model, values, (x,))
        return output.flatten()

    numeric = (moved(1) - moved(-1)) / (2 * step)
    flat = torch.cat([directions[name].flatten() for name in names])
    assert_close(example_jacobian(model, names, x[0]) @ flat, numeric.detach(), 1e-7)


def test_expected_empirical_fisher_is_ggn() -> None:
    """Averaging the empirical Fisher over the model's own labels gives the GGN."""
    case = BY_NAME["tanh-mlp"]
    model, loss_func = case.model(), nn.CrossEntropyLoss()
    names, x = case.names(model), case.inputs()[:1]
    p = model(x).softmax(dim=1)[0].detach()
    terms = [
        p_c * dense_empirical_fisher(model, loss_func, names, x, torch.tensor([c]))
        for c, p_c in enumerate(p)
    ]
    expected = torch.stack(terms).sum(dim=0)
    assert_close(dense_ggn(model, loss_func, names, x, torch.tensor([0])), expected)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_mean_divides_by_examples_and_elements(case: Case, loss: str) -> None:
    """Cross entropy counts positions, the elementwise losses count elements."""
    model, y = evaluation_copy(case.model()), case.targets(loss)
    positions = case.output_shape[1:] if loss == "ce" else case.output_shape
    outputs = model(case.inputs()).detach()
    assert mean_divisor(LOSSES[loss](), outputs, y) == case.examples * case.rows * prod(positions)


def test_gradient_of_batch_is_mean_of_examples() -> None:
    """Per-example gradients average to the gradient of the whole batch's loss."""
    case = BY_NAME["conv2d-stride-groups"]
    model, loss_func = case.model(), nn.MSELoss()
    x, y = case.inputs(), case.targets("mse")
    gradients = torch.autograd.grad(loss_func(model(x), y), list(model.parameters()))
    names = case.names(model)
    rows = [example_gradient(model, loss_func, names, *pair) for pair in by_example(x, y)]
    assert_close(torch.stack(rows).mean(dim=0), torch.cat([g.flatten() for g in gradients]))


# --------------------------------------------------------------------------- layout


def test_block_indices_put_the_bias_first() -> None:
    """Grouped joint layout, written out by hand."""
    shapes = {"other": (2,), "w": (4, 1, 2), "b": (4,)}
    expected = torch.tensor([[[10, 2, 3], [11, 4, 5]], [[12, 6, 7], [13, 8, 9]]])
    assert torch.equal(block_indices(shapes, ("w", "b"), 2), expected)
    assert torch.equal(block_indices(shapes, ("b",), 2), torch.tensor([[[10], [11]], [[12], [13]]]))
    assert torch.equal(block_indices(shapes, ("w",), 1), torch.arange(2, 10).reshape(1, 4, 2))


def test_dense_block_acts_on_row_major_matrices() -> None:
    """``(Q_g (x) Q_a) diag(L) (Q_g (x) Q_a)^T vec(V) = vec(Q_g (L * Q_g^T V Q_a) Q_a^T)``."""
    q_g, q_a = orthogonal(2, 3, 3), orthogonal(2, 4, 4)
    eigenvalues = torch.arange(24, dtype=torch.float64).reshape(2, 3, 4)
    v = torch.sin(torch.arange(24, dtype=torch.float64)).reshape(2, 3, 4)
    for gradient_basis, activation_basis in [(q_g, q_a), (None, q_a), (q_g, None), (None, None)]:
        block = FakeBlock(("w",), gradient_basis, activation_basis, eigenvalues)
        left = q_g if gradient_basis is not None else EYE3.expand(2, 3, 3)
        eye4 = torch.eye(4, dtype=torch.float64)
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


def test_layouts_keep_weight_and_bias_apart_or_together() -> None:
    """Joint blocks only where both parameters are estimated."""
    case = BY_NAME["subset-of-parameters"]
    model = case.model()
    names = case.names(model)
    apart = [layout.parameters for layout in expected_layouts(model, names, joint=False)]
    together = [layout.parameters for layout in expected_layouts(model, names, joint=True)]
    assert apart == [("2.weight",), ("4.bias",), ("6.weight",), ("6.bias",)]
    assert together == [("2.weight",), ("4.bias",), ("6.weight", "6.bias")]


# --------------------------------------------------------------------------- layer terms


@pytest.mark.parametrize("case", CASES, ids=str)
def test_unfolded_layers_are_matrix_products(case: Case) -> None:
    """Unfolded inputs times the weight matrix, plus the bias, are the layer's outputs."""
    model = evaluation_copy(case.model())
    kinds = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
    layers = [module for module in model.modules() if isinstance(module, kinds)]
    seen = []

    def check(module: Any, args: tuple[Tensor], z: Tensor) -> None:
        a = unfold_input(module, args[0])
        groups = a.shape[2]
        weight = module.weight.reshape(groups, -1, a.shape[-1])
        expected = torch.einsum("nsgi,goi->nsgo", a, weight)
        if module.bias is not None:
            expected = expected + module.bias.reshape(groups, -1)
        assert_close(unfold_output(module, z), expected)
        seen.append(module)

    with torch.no_grad(), output_hook(layers, check):
        model(case.inputs())
    assert set(seen) == set(layers)


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_layer_terms_make_up_the_exact_block(case: Case, loss: str, fisher: Fisher) -> None:
    """Per-example gradients from layer terms square to the dense matrix's block."""
    model, x, y, loss_func = case.model(), case.inputs(), case.targets(loss), LOSSES[loss]()
    names = case.names(model)
    shapes = parameter_shapes(model, names)
    dense = dense_fisher(model, loss_func, names, x, y, fisher)
    checked = 0
    for layout in expected_layouts(model, names, joint=True):
        if not layout.parameters[0].endswith("weight"):
            continue
        terms = layer_terms(model, loss_func, layout.parameters[0], x, y, fisher)
        terms = terms.with_bias() if len(layout.parameters) == 2 else terms
        gradients = terms.weight_gradients().flatten(start_dim=3)
        expected = torch.einsum("nvgi,nvgj->gij", gradients, gradients)
        assert_close(block_matrix(dense, shapes, layout.parameters, layout.groups), expected)
        checked += 1
    assert checked > 0


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("case", UNSHARED, ids=str)
def test_kfac_is_exact_for_one_unshared_example(case: Case, approximation: Approximation) -> None:
    """With one example and one position the Fisher block is a Kronecker product."""
    model, x, y = case.model(), case.inputs()[:1], case.targets("ce")[:1]
    names = case.names(model)
    shapes = parameter_shapes(model, names)
    dense = dense_ggn(model, nn.CrossEntropyLoss(), names, x, y)
    for name in names:
        if name.endswith("weight"):
            terms = layer_terms(model, nn.CrossEntropyLoss(), name, x, y, "type2")
            assert_close(kfac_matrix(terms, approximation), block_matrix(dense, shapes, (name,)))


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
    model, x, _ = linear_problem()
    y = BY_NAME["single-linear"].targets("mse")
    dense = dense_ggn(model, nn.MSELoss(), NAMES, x, y)
    terms = layer_terms(model, nn.MSELoss(), "0.weight", x, y, "type2").with_bias()
    assert_close(kfac_matrix(terms, "expand")[0], joint_block(dense, model))


def test_reduce_and_expand_differ_on_shared_positions() -> None:
    """Averaging positions first is another matrix, and exact for pooled linear models."""
    case = BY_NAME["pooled-linear"]
    model, x, y = case.model(), case.inputs(), case.targets("mse")
    names = case.names(model)
    shapes = parameter_shapes(model, names)
    dense = dense_ggn(model, nn.MSELoss(), names, x, y)
    for name in ("0.weight", "1.weight"):
        exact = block_matrix(dense, shapes, (name,))
        terms = layer_terms(model, nn.MSELoss(), name, x, y, "type2")
        assert_close(kfac_matrix(terms, "reduce"), exact)
        assert (kfac_matrix(terms, "expand") - exact).norm() > 0.1 * exact.norm()
