"""Dense curvature, one example at a time."""

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian
from torch.func import functional_call, grad, vjp

Fisher = Literal["type2", "empirical"]
Shapes = Mapping[str, tuple[int, ...]]
Loss = nn.Module


# --------------------------------------------------------------------------- losses


def with_reduction(loss_func: Loss, reduction: str) -> Loss:
    """Return the same loss, with all of its options, under another reduction.

    Args:
        loss_func: A loss module.
        reduction: ``"sum"`` or ``"mean"``.

    Returns:
        A copy of the loss.
    """
    other = copy.copy(loss_func)
    other.reduction = reduction
    return other


def loss_mass(loss_func: Loss, outputs: Tensor, targets: Tensor) -> float:
    """Measure what ``mean`` divides by, by asking the loss itself.

    Args:
        loss_func: The loss; its reduction is ignored.
        outputs: Outputs of some examples, or of the whole data set.
        targets: Their targets.

    Returns:
        The ratio of the summed to the averaged loss; 0 where nothing is averaged.
    """
    summed = float(with_reduction(loss_func, "sum")(outputs, targets))
    averaged = float(with_reduction(loss_func, "mean")(outputs, targets))
    return 0.0 if math.isnan(averaged) else summed / averaged


def output_hessian(loss_func: Loss, output: Tensor, target: Tensor) -> Tensor:
    """Differentiate the summed loss of one example twice with respect to the model's output.

    Args:
        loss_func: The loss; its reduction is ignored.
        output: Output of one example, ``[rows, *]``.
        target: Target of that example, ``[rows, *]``.

    Returns:
        The Hessian, ``[M, M]`` with M the number of output elements.
    """
    summed = with_reduction(loss_func, "sum")

    def loss_of(flat_output: Tensor) -> Tensor:
        loss: Tensor = summed(flat_output.reshape(output.shape), target)
        return loss

    curvature: Tensor = hessian(loss_of, output.detach().reshape(-1))
    return curvature


# --------------------------------------------------------------------------- models


def evaluation_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a model in evaluation mode, leaving the original alone.

    Args:
        model: Any module.

    Returns:
        The copy, whose parameters do not require gradients.
    """
    return copy.deepcopy(model).eval().requires_grad_(False)


def by_example(x: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Go through examples, of which each may own several consecutive rows of outputs and targets.

    Args:
        x: All inputs, ``[N, *]``.
        *others: Tensors ``[N * rows, *]``.

    Yields:
        One input without the batch axis, and the ``[rows, *]`` that belong to it.
    """
    pieces = [torch.split(other, len(other) // len(x)) for other in others]
    yield from zip(x, *pieces, strict=True)


def parameter_shapes(model: nn.Module, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the named parameters, in the order of the names.

    Args:
        model: The model.
        names: Names as in ``model.named_parameters()``.

    Returns:
        Name to shape.
    """
    parameters = dict(model.named_parameters())
    return {name: tuple(parameters[name].shape) for name in names}


def flatten_parameters(tensors: Mapping[str, Tensor], names: Iterable[str]) -> Tensor:
    """Flatten and concatenate tensors shaped like the parameters.

    Args:
        tensors: Name to tensor.
        names: The order.

    Returns:
        A vector of all parameters.
    """
    return torch.cat([tensors[name].reshape(-1) for name in names])


def detached_parameters(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Return the values of the named parameters.

    Args:
        model: The model.
        names: Names as in ``model.named_parameters()``.

    Returns:
        Name to value.
    """
    named = dict(model.named_parameters())
    return {name: named[name].detach() for name in names}


def example_jacobian(model: nn.Module, names: Sequence[str], x: Tensor) -> Tensor:
    """Differentiate all outputs of one example with respect to the named parameters.

    One row after the other, since not every operation has a batched derivative.

    Args:
        model: The model, already in evaluation mode.
        names: The parameters, in the order of the columns.
        x: One input, without the batch axis.

    Returns:
        The Jacobian ``[M, D]``.
    """

    def outputs(values: dict[str, Tensor]) -> Tensor:
        output: Tensor = functional_call(model, values, (x[None],))
        return output.reshape(-1)

    value, pull_back = vjp(outputs, detached_parameters(model, names))
    units = torch.eye(len(value), dtype=value.dtype)
    return torch.stack([flatten_parameters(pull_back(unit)[0], names) for unit in units])


def example_jacobians(model: nn.Module, names: Sequence[str], x: Tensor) -> list[Tensor]:
    """Differentiate the outputs of every example, as `example_jacobian` does.

    Args:
        model: The model; it is evaluated in evaluation mode.
        names: The parameters, in the order of the columns.
        x: All inputs, ``[N, *]``.

    Returns:
        N Jacobians ``[M, D]``.
    """
    model = evaluation_copy(model)
    return [example_jacobian(model, names, x_n) for x_n in x]


def example_gradient(
    model: nn.Module, loss_func: Loss, names: Sequence[str], x: Tensor, y: Tensor
) -> Tensor:
    """Differentiate the loss of one example alone, under the loss's own reduction.

    Args:
        model: The model, already in evaluation mode.
        loss_func: The loss.
        names: The parameters, in the order of the entries.
        x: One input, without the batch axis.
        y: Its target, ``[rows, *]``.

    Returns:
        The gradient ``[D]``.
    """

    def loss_of(values: dict[str, Tensor]) -> Tensor:
        loss: Tensor = loss_func(functional_call(model, values, (x[None],)), y)
        return loss

    return flatten_parameters(grad(loss_of)(detached_parameters(model, names)), names)


# --------------------------------------------------------------------------- dense curvature


def dense_ggn(
    model: nn.Module,
    loss_func: Loss,
    names: Sequence[str],
    x: Tensor,
    y: Tensor,
    jacobians: Sequence[Tensor] | None = None,
) -> Tensor:
    """Assemble the generalised Gauss-Newton matrix over the named parameters.

    Args:
        model: The model; it is evaluated in evaluation mode.
        loss_func: The loss, whose reduction sets the scale.
        names: The parameters, in the order of rows and columns.
        x: All inputs, ``[N, *]``.
        y: All targets, ``[N, *]`` or ``[N * rows, *]``.
        jacobians: `example_jacobians` of all inputs, which no loss changes, to make them only once.

    Returns:
        The matrix ``[D, D]``.
    """
    model = evaluation_copy(model)
    with torch.no_grad():
        outputs = model(x)
    jacobians = example_jacobians(model, names, x) if jacobians is None else jacobians
    total: Tensor | None = None
    for jacobian, (_, y_n, output) in zip(jacobians, by_example(x, y, outputs), strict=True):
        term = jacobian.T @ output_hessian(loss_func, output, y_n) @ jacobian
        total = term if total is None else total + term
    assert total is not None
    return total / loss_mass(loss_func, outputs, y) if loss_func.reduction == "mean" else total


def dense_empirical_fisher(
    model: nn.Module, loss_func: Loss, names: Sequence[str], x: Tensor, y: Tensor
) -> Tensor:
    """Sum the outer products of the gradients of every example's summed loss.

    Under ``mean`` the sum is divided by what the loss of all data divides by.

    Args:
        model: The model; it is evaluated in evaluation mode.
        loss_func: The loss, whose reduction sets the scale.
        names: The parameters, in the order of rows and columns.
        x: All inputs, ``[N, *]``.
        y: All targets, ``[N, *]`` or ``[N * rows, *]``.

    Returns:
        The matrix ``[D, D]``.
    """
    model = evaluation_copy(model)
    with torch.no_grad():
        outputs = model(x)
    summed = with_reduction(loss_func, "sum")
    examples = by_example(x, y, outputs)
    gradients = [example_gradient(model, summed, names, x_n, y_n) for x_n, y_n, _ in examples]
    total = torch.stack([torch.outer(gradient, gradient) for gradient in gradients]).sum(dim=0)
    return total / loss_mass(loss_func, outputs, y) if loss_func.reduction == "mean" else total


def dense_fisher(
    model: nn.Module,
    loss_func: Loss,
    names: Sequence[str],
    x: Tensor,
    y: Tensor,
    fisher: Fisher,
) -> Tensor:
    """Assemble the exact matrix that a Fisher type stands for.

    Args:
        model: The model; it is evaluated in evaluation mode.
        loss_func: The loss, whose reduction sets the scale.
        names: The parameters, in the order of rows and columns.
        x: All inputs, ``[N, *]``.
        y: All targets, ``[N, *]`` or ``[N * rows, *]``.
        fisher: Which Fisher matrix.

    Returns:
        The matrix ``[D, D]``.
    """
    build = dense_ggn if fisher == "type2" else dense_empirical_fisher
    return build(model, loss_func, names, x, y)


def squared_error_ggn(model: nn.Module, x: Tensor) -> Tensor:
    """Assemble the matrix of the mean squared error, with nothing but ordinary backward passes."""
    parameters = list(model.parameters())
    rows = []
    for example in x.split(1):
        for output in model(example).flatten():
            found = torch.autograd.grad(output, parameters, retain_graph=True, allow_unused=True)
            pairs = zip(found, parameters, strict=True)
            rows.append(
                torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])
            )
    jacobian = torch.stack(rows)
    return 2 * jacobian.T @ jacobian / len(rows)
