"""The oracles against closed forms and finite differences; the library takes no part in this."""

from functools import partial
from math import prod

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from tests.helpers import oracles
from tests.helpers.cases import BY_NAME, CASES, PLAIN_LOSSES, Case
from tests.helpers.cases.modules import later, sequential
from tests.helpers.oracles import (
    block_matrix,
    by_example,
    dense_empirical_fisher,
    dense_ggn,
    evaluation_copy,
    example_gradient,
    example_jacobian,
    parameter_shapes,
)

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")

REDUCTIONS = ("mean", "sum")
EYE3 = torch.eye(3, dtype=torch.float64)
NAMES = ("0.weight", "0.bias")

assert_close = partial(oracles.assert_close, tolerance=1e-12)


def linear_problem() -> tuple[nn.Module, Tensor, Tensor]:
    """One Linear layer 4 -> 3, its inputs and, with a leading 1, its extended inputs."""
    case = BY_NAME["single-linear"]
    x = case.inputs()
    return case.model(), x, torch.cat([torch.ones_like(x[:, :1]), x], dim=1)


def joint_block(dense: Tensor, model: nn.Module) -> Tensor:
    """Cut the weight-and-bias block out of a one-layer model's matrix."""
    return block_matrix(dense, parameter_shapes(model, NAMES), NAMES)[0]


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
@pytest.mark.parametrize("loss", PLAIN_LOSSES)
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
    gradients = torch.einsum("no,ni->noi", residual, extended).flatten(start_dim=1)
    terms = {"sum": 1, "mean": len(x) if loss == "ce" else f.numel()}[reduction]
    expected = gradients.T @ gradients / terms
    loss_func = BY_NAME["single-linear"].loss_func(loss, reduction)
    dense = dense_empirical_fisher(model, loss_func, NAMES, x, y)
    assert_close(joint_block(dense, model), expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("loss", PLAIN_LOSSES)
@pytest.mark.parametrize(
    "name", ["single-linear", "conv", "tokens", "conv-transpose1d-linear", "embedding"]
)
def test_linear_in_parameters_means_hessian(name: str, loss: str, reduction: str) -> None:
    """For a model linear in its parameters the GGN is the Hessian of the loss."""
    case = {
        "single-linear": BY_NAME["single-linear"],
        "conv-transpose1d-linear": BY_NAME["conv-transpose1d-linear"],
        "embedding": Case("embedding", later(nn.Embedding, 4, 2), (3,), (3, 2), vocabulary=4),
        "conv": Case(
            "conv",
            sequential(later(nn.Conv2d, 2, 2, 2, padding=1, groups=2), lambda: nn.Flatten(2)),
            (2, 2, 2),
            (2, 9),
        ),
        "tokens": Case("tokens", lambda: nn.Linear(3, 2), (2, 3), (2, 2)),
    }[name]
    model, x, y = case.model(), case.inputs(), case.targets(loss)
    loss_func = case.loss_func(loss, reduction)
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
    for name, module in model.named_modules():
        table = f"{name}.weight"
        if table in directions and getattr(module, "padding_idx", None) is not None:
            # torch gives this row no gradient
            directions[table][module.padding_idx] = 0
    step = 1e-6

    def moved(sign: int) -> Tensor:
        parameters = dict(model.named_parameters())
        values = {n: parameters[n].detach() + sign * step * d for n, d in directions.items()}
        output: Tensor = functional_call(model, values, (x,))
        return output.flatten()

    numeric = (moved(1) - moved(-1)) / (2 * step)
    flat = torch.cat([directions[name].flatten() for name in names])
    assert_close(example_jacobian(model, names, x[0]) @ flat, numeric.detach(), tolerance=1e-7)


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


def test_gradient_of_batch_is_mean_of_examples() -> None:
    """Per-example gradients average to the gradient of the whole batch's loss."""
    case = BY_NAME["conv2d-stride-groups"]
    model, loss_func = case.model(), nn.MSELoss()
    x, y = case.inputs(), case.targets("mse")
    gradients = torch.autograd.grad(loss_func(model(x), y), list(model.parameters()))
    names = case.names(model)
    rows = [example_gradient(model, loss_func, names, *pair) for pair in by_example(x, y)]
    assert_close(torch.stack(rows).mean(dim=0), torch.cat([g.flatten() for g in gradients]))
