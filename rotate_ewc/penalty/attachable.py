"""What a penalty can be attached to: optimizers, models, views, and how often it looks at them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Final

from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from rotate_ewc._utils.messages import quoted
from rotate_ewc._utils.parameters import code_of_part, named_parameters
from rotate_ewc.distributed.sharding import fully_sharded_modules, reshard
from rotate_ewc.penalty.step_rules import StepRule, known_optimizers, rule_of
from rotate_ewc.penalty.updates import UpdateKind

# How many names of each side a message has.
_FEW: Final = 3
# In the names of what PEFT puts adapters around.
_ADAPTED: Final = ".base_layer."


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


def check_names(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    protected: Sequence[str],
    *,
    attached: bool = False,
) -> None:
    """Raise if a model has none of the parameters that a penalty protects, by their names.

    Args:
        model: The model.
        parameters: Its parameters by name.
        protected: The names of those that are protected.
        attached: Whether the penalty is attached already, which the advice takes into account.
    """
    if not protected or not parameters.keys().isdisjoint(protected):
        return
    own = list(dict.fromkeys([*(_like(n, parameters) for n in protected[:_FEW]), *parameters]))
    detach = "Attachment.of(optimizer).detach(). Then attach" if attached else "Attach"
    raise ValueError(
        f"the penalty protects {_few(protected)}, but the model has no parameter of these names; "
        f"its own are {_few(own)}. {detach} to {_remedy(model, own, protected)}"
    )


def _like(name: str, names: Iterable[str]) -> str:
    """Return that of some names which is most like another."""
    known = list(names)
    longer = (other for other in known if other.replace(_ADAPTED, ".").endswith(f".{name}"))
    return next(longer, None) or get_close_matches(name, known, n=1, cutoff=0.0)[0]


def _few(names: Sequence[str]) -> str:
    more = len(names) - _FEW
    return quoted(names[:_FEW]) + (f" and {more} more" if more > 0 else "")


def _remedy(model: nn.Module, own: Iterable[str], protected: Sequence[str]) -> str:
    """Return what to attach to in place of a model with other names than those protected."""
    modules = dict(model.named_modules())
    # PEFT is not imported: it need not be installed.
    adapted = next((p for p, m in modules.items() if hasattr(m, "peft_config")), None)
    below = (name.replace(_ADAPTED, ".") for name in own if _ADAPTED in name)
    if adapted is not None and any(name.endswith(tuple(protected)) for name in below):
        return (
            f"the weights under the adapters: penalty.attach(optimizer, {code_of_part(adapted)}, "
            f"'gradient', view=effective_parameters), from rotate_ewc.integrations.peft"
        )
    for path, module in modules.items():
        if named_parameters(module).keys() >= set(protected):
            part = code_of_part(path)
            return f"the part that was consolidated: penalty.attach(optimizer, {part})"
    if adapted is not None:
        return "a model whose adapters have the adapter_name that they had when consolidated"
    return "the module that was consolidated, or to one with the same names"


def check_optimizer(optimizer: Optimizer, update: UpdateKind) -> StepRule | None:
    """Return the rule for an optimizer, or raise if it cannot take part in an update."""
    name = type(optimizer).__name__
    if isinstance(optimizer, LBFGS):
        raise ValueError(
            f"optimizer is {name}, which evaluates the loss at several points in each step; "
            f"expected another one, or add penalty(model) to the loss (in the Avalanche plugin: "
            f"update='loss', with a number as ewc_lambda)"
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
