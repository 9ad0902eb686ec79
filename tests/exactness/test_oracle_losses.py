"""The oracles of losses against closed forms; the library takes no part in this."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from tests.helpers import oracles
from tests.helpers.cases import BY_NAME, CASES, LOSSES, PLAIN_LOSSES, Case
from tests.helpers.oracles import (
    by_example,
    dense_ggn,
    evaluation_copy,
    example_gradient,
    loss_mass,
    output_hessian,
    with_reduction,
)

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")

assert_close = partial(oracles.assert_close, tolerance=1e-12)
over_losses = pytest.mark.parametrize("loss", LOSSES)
SHAPES = ("single-linear", "sequence-linear", "conv2d-sequence-outputs")


def curvature_weights(loss: nn.Module, target: Tensor, output: Tensor) -> Tensor:
    """Return what cross entropy multiplies ``diag(p) - p p^T`` with, for every prediction.

    The loss of a prediction is ``-sum_c t_c w_c log p_c``, where smoothing mixes the uniform
    distribution into the target t.
    """
    assert isinstance(loss, nn.CrossEntropyLoss)
    classes = output.shape[1]
    weight = torch.ones(classes).double() if loss.weight is None else loss.weight
    if target.is_floating_point():
        distribution, counts = target.movedim(1, -1), torch.ones(())
    else:
        labels = target.clamp(0, classes - 1)
        distribution = nn.functional.one_hot(labels, classes).double()
        counts = target != loss.ignore_index
    smoothed = (1 - loss.label_smoothing) * distribution + loss.label_smoothing / classes
    return counts * (smoothed * weight).sum(dim=-1)


@pytest.mark.parametrize("name", SHAPES)
@over_losses
def test_hessian_of_summed_loss(name: str, loss: str) -> None:
    """Position by position for cross entropy, element by element for the others."""
    case = BY_NAME[name]
    loss_func, y = case.loss_func(loss), case.targets(loss)
    outputs = evaluation_copy(case.model())(case.inputs())
    f, y = outputs[1:2], y[1:2]
    actual = output_hessian(loss_func, f, y)
    expected = torch.zeros_like(actual)
    if isinstance(loss_func, nn.CrossEntropyLoss):
        indices = torch.arange(f.numel()).reshape(f.shape[1], -1)
        weights = curvature_weights(loss_func, y, f).flatten()
        for weight, own, p in zip(
            weights, indices.T, f.softmax(1).reshape(f.shape[1], -1).T, strict=True
        ):
            expected[own[:, None], own] = weight * (torch.diag(p) - torch.outer(p, p))
    else:
        entries = torch.full_like(f, 2.0)
        if isinstance(loss_func, nn.BCEWithLogitsLoss):
            positive = 1.0 if loss_func.pos_weight is None else loss_func.pos_weight
            weight = 1.0 if loss_func.weight is None else loss_func.weight
            entries = weight * (1 - y + positive * y) * f.sigmoid() * (-f).sigmoid()
        expected = torch.diag(entries.flatten())
    assert_close(actual, expected)


@pytest.mark.parametrize("name", SHAPES)
@over_losses
def test_mean_divides_by_what_counts(name: str, loss: str) -> None:
    """Class weights of the labels that count, predictions, or elements."""
    case = BY_NAME[name]
    loss_func, y = case.loss_func(loss), case.targets(loss)
    outputs = evaluation_copy(case.model())(case.inputs())
    if isinstance(loss_func, nn.CrossEntropyLoss):
        expected = float(outputs.numel() // outputs.shape[1])
        if not y.is_floating_point():
            kept = y[y != loss_func.ignore_index]
            expected = float(len(kept))
            if loss_func.weight is not None:
                expected = float(loss_func.weight[kept].sum())
    else:
        expected = float(outputs.numel())
    assert loss_mass(loss_func, outputs, y) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_mean_divides_by_examples_and_elements(case: Case) -> None:
    """Cross entropy counts positions, the elementwise losses count elements."""
    outputs = evaluation_copy(case.model())(case.inputs())
    for loss in PLAIN_LOSSES:
        positions = case.output_shape[1:] if loss == "ce" else case.output_shape
        expected = case.examples * case.rows * torch.Size(positions).numel()
        mass = loss_mass(case.loss_func(loss), outputs, case.targets(loss))
        assert mass == pytest.approx(expected, rel=1e-12), loss


@over_losses
def test_loss_of_the_data_is_the_weighted_mean_of_examples(loss: str) -> None:
    """Examples count with their share of what the loss of all data divides by."""
    case = BY_NAME["sequence-outputs"]
    model, loss_func, y = case.model().eval(), case.loss_func(loss), case.targets(loss)
    outputs = model(case.inputs())
    gradients = torch.autograd.grad(loss_func(outputs, y), list(model.parameters()))
    total = torch.zeros(sum(gradient.numel() for gradient in gradients)).double()
    ignored = 0
    for x_n, y_n, output in by_example(case.inputs(), y, outputs.detach()):
        mass = loss_mass(loss_func, output, y_n)
        if mass > 0:
            share = mass / loss_mass(loss_func, outputs.detach(), y)
            total += share * example_gradient(model, loss_func, case.names(model), x_n, y_n)
        else:
            ignored += 1
    assert (ignored > 0) == (LOSSES[loss].targets == "ignored")
    assert_close(total, torch.cat([gradient.flatten() for gradient in gradients]))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@over_losses
def test_linear_in_parameters_means_hessian(loss: str, reduction: str) -> None:
    """For a model linear in its parameters the GGN is the Hessian of the loss."""
    case = BY_NAME["single-linear"]
    model, x, y = case.model(), case.inputs(), case.targets(loss)
    loss_func = case.loss_func(loss, reduction)
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])

    def loss_of(theta: Tensor) -> Tensor:
        values = {"0.weight": theta[:12].reshape(3, 4), "0.bias": theta[12:]}
        value: Tensor = loss_func(functional_call(model, values, (x,)), y)
        return value

    actual = dense_ggn(model, loss_func, case.names(model), x, y)
    assert_close(actual, jacrev(jacrev(loss_of))(flat))


@over_losses
def test_changing_the_reduction_keeps_the_options(loss: str) -> None:
    """And leaves the loss as it was."""
    before = BY_NAME["single-linear"].loss_func(loss, "mean")
    after = with_reduction(before, "sum")
    assert (before.reduction, after.reduction) == ("mean", "sum")
    assert {*before.state_dict()} == {*after.state_dict()}
    for option in ("ignore_index", "label_smoothing"):
        assert getattr(before, option, None) == getattr(after, option, None)
