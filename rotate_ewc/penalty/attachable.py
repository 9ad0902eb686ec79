"""What a penalty can be attached to: optimizers, models, views, and how often it looks at them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from rotate_ewc.distributed.sharding import fully_sharded_modules, reshard
from rotate_ewc.penalty.step_rules import StepRule, known_optimizers, rule_of
from rotate_ewc.penalty.updates import UpdateKind


def unwrapped_optimizer(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer inside wrappers such as accelerate's."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer is {type(optimizer).__name__}; expected a torch.optim.Optimizer"
        )
    return optimizer


def check_model(model: nn.Module, optimizer: Optimizer) -> list[Any]:
    """Raise unless an optimizer has parameters of a model; return the modules of FSDP2 in it."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; expected a torch.nn.Module")
    modules = fully_sharded_modules(model)
    reshard(modules)
    own = {id(parameter) for parameter in model.parameters()}
    given: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
    if not any(id(parameter) in own for parameter in given):
        raise ValueError(
            f"the optimizer has {len(given)} parameters, none of which belongs to the model; "
            f"expected an optimizer of this model, made after the model was last moved or wrapped"
        )
    return modules


def check_optimizer(optimizer: Optimizer, update: UpdateKind) -> StepRule | None:
    """Return the rule for an optimizer, or raise if it cannot take part in an update."""
    name = type(optimizer).__name__
    if isinstance(optimizer, LBFGS):
        raise ValueError(
            f"optimizer is {name}, which evaluates the loss at several points in each step; "
            f"expected another one, or add penalty(model) to the loss (in the Avalanche plugin: "
            f"update='loss')"
        )
    if any(group.get("differentiable") for group in optimizer.param_groups):
        raise ValueError(
            "the optimizer has differentiable=True; expected False: a penalty cannot be attached "
            "to steps that are differentiated"
        )
    rule = rule_of(optimizer)
    if rule is None and update is not UpdateKind.GRADIENT:
        raise ValueError(
            f"optimizer is {name}, whose step size is unknown, but update={update.value!r} "
            f"needs it; expected one of {', '.join(known_optimizers())}; or use "
            f"update='gradient', or add a rule: register_step_size({name}, rule)"
        )
    return rule


def check_view(view: object, update: UpdateKind) -> None:
    """Raise unless there is an update for tensors that are computed from parameters."""
    if not callable(view):
        raise TypeError(
            f"view is {type(view).__name__}; expected a function from the model to protected "
            f"tensors by name, such as rotate_ewc.integrations.peft.effective_parameters"
        )
    if update is not UpdateKind.GRADIENT:
        raise ValueError(
            f"update is {update.value!r}, which moves protected tensors directly, but those of a "
            f"view are computed from others; expected update='gradient'"
        )


def check_cadence(
    every: int, update: UpdateKind, rule: StepRule | None, optimizer: Optimizer
) -> None:
    """Raise unless an update can be taken every k steps."""
    if every == 1 or update is UpdateKind.TANGENT:
        return
    if update is UpdateKind.GRADIENT or rule is None or rule.rotated:
        raise ValueError(
            f"every is {every}, but update={update.value!r} applies the penalty in every step of "
            f"{type(optimizer).__name__}; expected 1, or update='tangent'"
        )
