"""Dense matrices of any loss, example by example, with nothing but autograd."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev

Values = Mapping[str, Tensor]


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """Return detached parameters."""
    return {name: p.detach() for name, p in model.named_parameters()}


def outer_products(gradients: list[Tensor]) -> Tensor:
    """Sum `g gᵀ`."""
    stacked = torch.stack(gradients)
    return stacked.T @ stacked


def example_gradients(
    model: nn.Module, loss: Callable[[Any, int], Tensor], inputs: Tensor
) -> list[Tensor]:
    """Differentiate the loss of every example by the parameters.

    Args:
        model: The model.
        loss: From the outputs of one example, as a batch, and its number to its loss.
        inputs: All inputs.
    """

    def loss_of(values: Values, n: int) -> Tensor:
        return loss(functional_call(model, dict(values), (inputs[n : n + 1],)), n)

    gradients = [grad(loss_of)(parameters_of(model), n) for n in range(len(inputs))]
    return [torch.cat([g.flatten() for g in gradient.values()]) for gradient in gradients]


def gauss_newton(
    model: nn.Module,
    loss: Callable[[Tensor, int], Tensor],
    inputs: Tensor,
    outputs_of: Callable[[Any], Tensor] = lambda outputs: outputs,
) -> Tensor:
    """Sum `Jᵀ H J` over the examples, with H the Hessian of the loss by its outputs.

    Args:
        model: The model.
        loss: From the outputs of one example, as a batch, and its number to its loss.
        inputs: All inputs.
        outputs_of: From what the model returns to one tensor.
    """
    parameters = parameters_of(model)
    total: Tensor | None = None
    for n in range(len(inputs)):

        def outputs(values: Values, n: int = n) -> Tensor:
            return outputs_of(functional_call(model, dict(values), (inputs[n : n + 1],)))

        found = outputs(parameters)
        columns = jacrev(outputs)(parameters).values()
        jacobian = torch.cat([c.reshape(found.numel(), -1) for c in columns], dim=1)
        curvature = jacrev(jacrev(lambda f, n=n: loss(f, n)))(found)
        term = jacobian.T @ curvature.reshape(found.numel(), -1) @ jacobian
        total = term if total is None else total + term
    assert total is not None
    return total
