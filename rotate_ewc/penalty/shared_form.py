"""The penalty as a term of the loss, where each process keeps only its share of the snapshots."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rotate_ewc.distributed.sharding import spread_like
from rotate_ewc.linalg.quadratic import quadratic_form, quadratic_gradient
from rotate_ewc.penalty.consolidated import ConsolidatedTasks


def shared_quadratic_form(penalty: ConsolidatedTasks, parameters: Mapping[str, Tensor]) -> Tensor:
    """Return `Σ_t (θ - θ*_t)ᵀ F_t (θ - θ*_t)`, once differentiable in the parameters.

    The owner of each block computes its value and its gradient; the sum of the values, and each
    process's part of the gradients, are all that the others get. To be called by all processes.

    Args:
        penalty: The penalty, of which this process keeps its own blocks.
        parameters: The model's, by name.
    """
    names = [name for name in penalty.protected_names if name in parameters]
    found = (parameters[name] for name in names)
    value: Tensor = _SharedForm.apply(penalty, names, torch.is_grad_enabled(), *found)
    return value


class _SharedForm(torch.autograd.Function):
    """Exchanges the gradients together with the value, so that `backward` exchanges nothing."""

    @staticmethod
    def forward(
        ctx: Any,
        penalty: ConsolidatedTasks,
        names: list[str],
        differentiable: bool,
        *parameters: Tensor,
    ) -> Tensor:
        owners, by_name = penalty.owners, dict(zip(names, parameters, strict=True))
        with owners.together():
            deltas = penalty.deltas(owners.gathered(by_name))
            blocks = [stack.block for stack in penalty.stacks]
            own = float(quadratic_form(blocks, deltas)) if blocks else 0.0
            (value,) = owners.ranks.total("value of the penalty", [own])
            ctx.gradients = dict.fromkeys(names)
            if differentiable and any(ctx.needs_input_grad):
                whole = _gradients(penalty, by_name, deltas)
                for name, found in owners.handed_out("gradients of the penalty", whole):
                    ctx.gradients[name] = spread_like(found["gradient"], by_name[name])
        dtype = penalty.terms[0].operator.dtype
        return torch.tensor(value, dtype=dtype, device=owners.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        factor = float(grad_output)
        found = (None if g is None else g * factor for g in ctx.gradients.values())
        return None, None, None, *found


def _gradients(
    penalty: ConsolidatedTasks, parameters: Mapping[str, Tensor], deltas: Mapping[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """Return the whole gradients of what this process keeps, in the parameters' dtypes."""
    products = quadratic_gradient([stack.block for stack in penalty.stacks], deltas)
    gradients: dict[str, dict[str, Tensor]] = {}
    for stack in penalty.stacks:
        for key, name, anchor in stack.members:
            parameter = parameters.get(name)
            if parameter is None:  # as strict=False allows
                continue
            if name not in gradients:
                zeros = torch.zeros(parameter.shape, dtype=parameter.dtype, device=anchor.device)
                gradients[name] = {"gradient": zeros}
            inner = tuple(map(slice, anchor.shape[1:]))
            gradients[name]["gradient"][inner] += 2.0 * products[key].sum(dim=0)
    return gradients
