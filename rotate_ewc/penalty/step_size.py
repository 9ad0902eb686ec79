"""The step size of an optimizer, as the proximal step needs it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from rotate_ewc._utils.parameters import parameters_of
from rotate_ewc._utils.validation import as_non_negative_number

StepSizes = float | dict[str, float]


def learning_rate_of(optimizer: Optimizer) -> float:
    """Return the learning rate of all groups.

    Raises:
        ValueError: If they have several.
    """
    rates = {float(group["lr"]) for group in optimizer.param_groups}
    if len(rates) != 1:
        raise ValueError(
            f"the optimizer's groups have learning rates {sorted(rates)}; expected one, or a "
            f"step_size that is given"
        )
    return rates.pop()


def check_optimizer(optimizer: Optimizer) -> None:
    """Raise `ValueError` unless the step sizes of an optimizer are known."""
    learning_rate_of(optimizer)
    _check_kind(optimizer)
    if isinstance(optimizer, SGD):
        _momentum_factor(optimizer)


def step_sizes_of(
    optimizer: Optimizer, model: nn.Module | Mapping[str, Tensor], learning_rate: float
) -> StepSizes:
    """Return how far an optimizer goes in the end for a gradient of one, as implicit steps need it.

    For SGD with momentum μ and dampening τ that is the learning rate times `(1 - τ) / (1 - μ)`:
    every gradient is used again, weakened by μ, in each of the later steps.

    Adam divides each entry of a gradient by the root of its mean square v, so that its step has a
    size of its own in every entry, which the eigenbasis of a penalty cannot follow. The geometric
    mean of `1 / (√v + ε)` over a parameter's entries stands for them all.

    Args:
        optimizer: SGD, Adam or AdamW, after at least one step.
        model: The model, or its parameters by name.
        learning_rate: The learning rate, or the sum of those of several steps, at least 0.

    Returns:
        One step size, or one for each parameter by name (0 for one that has not moved yet).

    Raises:
        ValueError: If the optimizer is of another kind, its groups differ in momentum, or the
            learning rate is out of range.
        TypeError: If `model` is neither a module nor a mapping, or the learning rate no number.

    Example:
        >>> import torch
        >>> from rotate_ewc import step_sizes_of
        >>> model = torch.nn.Linear(2, 2)
        >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
        >>> step_sizes_of(sgd, model, 10 * 0.1)
        2.0
    """
    learning_rate = as_non_negative_number("learning_rate", learning_rate)
    parameters = parameters_of(model)
    _check_kind(optimizer)
    if isinstance(optimizer, SGD):
        return learning_rate * _momentum_factor(optimizer)
    eps = float(optimizer.param_groups[0]["eps"])
    beta = float(optimizer.param_groups[0]["betas"][1])
    sizes = {}
    for name, parameter in parameters.items():
        state = optimizer.state.get(parameter)
        sizes[name] = learning_rate * _typical_scale(state, eps, beta) if state else 0.0
    return sizes


def _check_kind(optimizer: Optimizer) -> None:
    if not isinstance(optimizer, (SGD, Adam, AdamW)):
        raise ValueError(
            f"optimizer is {type(optimizer).__name__}, whose step size is not known; expected SGD, "
            f"Adam or AdamW, or a step_size that is given"
        )


def _typical_scale(state: Mapping[str, Any], eps: float, beta: float) -> float:
    """Return the geometric mean of `1 / (√v + ε)` where v is not zero."""
    bias = 1.0 - beta ** float(state["step"])
    roots = (state.get("max_exp_avg_sq", state["exp_avg_sq"]) / bias).sqrt()
    # An entry that never had a gradient does not move, and its scale would be enormous.
    moving = roots[roots > 0]
    return float(torch.exp(-torch.log(moving + eps).mean())) if moving.numel() else 0.0


def _momentum_factor(optimizer: Optimizer) -> float:
    factors = set()
    for group in optimizer.param_groups:
        momentum, dampening = float(group["momentum"]), float(group["dampening"])
        if momentum >= 1:
            raise ValueError(
                f"the optimizer has momentum {momentum:g}, with which a gradient acts for ever; "
                f"expected less than 1, or a step_size that is given"
            )
        factors.add((1.0 - dampening) / (1.0 - momentum) if momentum else 1.0)
    if len(factors) != 1:
        raise ValueError(
            "the optimizer's groups have different momentum or dampening; expected one for all, or "
            "a step_size that is given"
        )
    return factors.pop()
