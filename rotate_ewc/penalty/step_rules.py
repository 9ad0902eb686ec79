"""Step sizes of optimizers: a rule for each class, in one table.

A proximal step follows each step of the optimizer. It must know the optimizer's step size η in
every coordinate: a gradient g that has been constant for long leads to steps of η g. Then the
proximal step is exact, and it comes to rest where the gradients of loss and penalty cancel. In the
table, μ is the momentum, d the dampening, v the average of squared gradients, and t the number of
steps, all with their values after the step:

| optimizer | η |
|---|---|
| SGD | `lr (1 - d) / (1 - μ)`, for all coordinates |
| Adam, AdamW | `lr / (√(v / (1 - β₂ᵗ)) + ε)`; with amsgrad, v is its maximum |
| NAdam | that of Adam, times the sum of the weights of g and of its average |
| RAdam | that of Adam, rectified; in the first steps `lr` |
| Adamax | `lr / u`, u the decaying maximum of absolute gradients |
| Adagrad | `lr / (1 + (t - 1) decay) / (√v + ε)`, v the sum of squared gradients |
| Adadelta | `lr √(w + ε) / √(v + ε)`, w the average of squared steps |
| RMSprop | `lr / (1 - μ) / (√v + ε)`; centred, v is the variance |
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.optim import (
    LBFGS,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
)

from rotate_ewc._utils.validation import check_boolean

Options = Mapping[str, Any]
State = Mapping[str, Any]
StepSize = Tensor | float


class Quotient(NamedTuple):
    """A step size `rate / scale` that is not divided yet, for what can do so in passing.

    Attributes:
        rate: A number, which may be a tensor.
        scale: A tensor of the parameter's shape, which is not to be changed.
    """

    rate: StepSize
    scale: Tensor


def divided(size: StepSize | Quotient) -> StepSize:
    """Return a step size that may not have been divided yet."""
    return size.rate / size.scale if isinstance(size, Quotient) else size


class StepRule(NamedTuple):
    """What is known of a class of optimizers.

    Attributes:
        quotient: From the options of a parameter's group, and its state after a step, to η: a
            tensor of the parameter's shape, one number for all of its entries, or a quotient.
        rotated: Whether it treats every coordinate by itself, and so steps differently in another
            basis. SGD does not.
        decays_only: Whether it looks at parameters for their weight decay alone.
    """

    quotient: Callable[[Options, State], StepSize | Quotient]
    rotated: bool
    decays_only: bool

    def size(self, group: Options, state: State) -> StepSize:
        """Return η, a tensor of the parameter's shape or one number."""
        return divided(self.quotient(group, state))


def register_step_size(
    optimizer_class: type[Optimizer],
    rule: Callable[[Options, State], StepSize],
    *,
    rotated: bool = True,
) -> None:
    """Register the step size of a class of optimizers, so that penalties can be attached to it.

    Args:
        optimizer_class: The class, without subclasses that have a `step` of their own.
        rule: Function from the options of a parameter's group, and the parameter's state after a
            step, to the step size for a gradient that has long been 1: a tensor of the parameter's
            shape, or a number for all entries. It replaces an earlier rule for the class.
        rotated: Whether to step in the eigenbasis, as is right for all coordinatewise optimizers;
            False for those that take the same step in every orthonormal basis, as SGD does, whose
            rule returns a number and gets an empty state.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the class is LBFGS, which evaluates a loss at several points in each step.

    Examples:
        >>> import torch
        >>> from rotate_ewc import register_step_size
        >>> class SignSGD(torch.optim.Optimizer):
        ...     '''Moves every parameter by its learning rate.'''
        >>> register_step_size(SignSGD, lambda group, state: group["lr"])
    """
    if not isinstance(optimizer_class, type) or not issubclass(optimizer_class, Optimizer):
        raise TypeError(
            f"optimizer_class is {optimizer_class!r}; expected a subclass of torch.optim.Optimizer"
        )
    if not callable(rule):
        raise TypeError(
            f"rule is {rule!r}; expected a function from a group's options and a parameter's state "
            f"to a step size"
        )
    check_boolean("rotated", rotated)
    if issubclass(optimizer_class, LBFGS):
        raise ValueError(
            "optimizer_class is LBFGS, which evaluates the loss at several points in each step; "
            "expected one that evaluates it once, or add penalty(model) to the loss"
        )
    _RULES[optimizer_class] = StepRule(rule, rotated, decays_only=False)


def rule_of(optimizer: Optimizer) -> StepRule | None:
    """Return the rule for an optimizer; None if it is unknown how its class steps."""
    kind = type(optimizer)
    known = next((base for base in kind.__mro__ if base in _RULES), None)
    if known is None or inspect.unwrap(kind.step) is not inspect.unwrap(known.step):
        return None
    return _RULES[known]


def known_optimizers() -> list[str]:
    """Return the names of the classes that have a rule."""
    return [kind.__name__ for kind in _RULES]


def _sgd(group: Options, state: State) -> StepSize:
    return float(group["lr"]) * _momentum(group) * (1.0 - _dampening(group))


def _adam(group: Options, state: State) -> Quotient:
    return Quotient(group["lr"], _root(group, state).add_(group["eps"]))


def _nadam(group: Options, state: State) -> Quotient:
    steps, beta, decay = _steps(state), group["betas"][0], group["momentum_decay"]
    now, following = (beta * (1.0 - 0.5 * 0.96 ** (t * decay)) for t in (steps, steps + 1))
    product = _number(state["mu_product"])
    of_gradient = (1.0 - now) / (1.0 - product)
    of_average = following * (1.0 - beta**steps) / (1.0 - product * following)
    rate, scale = _adam(group, state)
    return Quotient((of_gradient + of_average) * rate, scale)


def _radam(group: Options, state: State) -> StepSize | Quotient:
    steps, beta = _steps(state), group["betas"][1]
    longest = 2.0 / (1.0 - beta) - 1.0
    length = longest - 2.0 * steps * beta**steps / (1.0 - beta**steps)
    if not bool(length > 5.0):
        return float(group["lr"])
    rectified = (length - 4.0) * (length - 2.0) * longest
    rectified = rectified / ((longest - 4.0) * (longest - 2.0) * length)
    # Its ε is not corrected for the bias of v.
    corrected = rectified**0.5 * (1.0 - beta**steps) ** 0.5
    scale = _tensor(state, "exp_avg_sq").sqrt().add_(group["eps"])
    return Quotient(corrected * group["lr"], scale)


def _adamax(group: Options, state: State) -> Quotient:
    return Quotient(group["lr"], _tensor(state, "exp_inf"))


def _adagrad(group: Options, state: State) -> Quotient:
    slower = 1.0 + (_steps(state) - 1.0) * group["lr_decay"]
    return Quotient(group["lr"] / slower, _tensor(state, "sum").sqrt().add_(group["eps"]))


def _adadelta(group: Options, state: State) -> StepSize:
    moved, average = (_tensor(state, name) + group["eps"] for name in ("acc_delta", "square_avg"))
    size: Tensor = group["lr"] * moved.sqrt_().div_(average.sqrt_())
    return size


def _rmsprop(group: Options, state: State) -> Quotient:
    average = _tensor(state, "square_avg")
    if group["centered"]:
        average = (average - _tensor(state, "grad_avg").square()).clamp_(min=0.0)
    return Quotient(group["lr"] * _momentum(group), average.sqrt().add_(group["eps"]))


def _tensor(state: State, name: str) -> Tensor:
    tensor: Tensor = state[name]
    return tensor


def _root(group: Options, state: State) -> Tensor:
    """Return √v of Adam's kin, corrected for its bias."""
    average = _tensor(state, "max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq")
    bias: StepSize = 1.0 - group["betas"][1] ** _steps(state)
    return average.sqrt().div_(bias**0.5)


def _momentum(group: Options) -> float:
    """Return how much further momentum takes a gradient in the end."""
    momentum = float(group["momentum"])
    if momentum >= 1:
        raise ValueError(
            f"the optimizer has momentum {momentum:g}, so that a gradient acts forever; "
            f"expected less than 1"
        )
    return 1.0 / (1.0 - momentum)


def _dampening(group: Options) -> float:
    return float(group["dampening"]) if group["momentum"] else 0.0


def _steps(state: State) -> Any:
    return _number(state["step"])


def _number(value: Any) -> Any:
    """Return a number, if that takes no waiting for a device; else leave it where it is."""
    return value.item() if torch.is_tensor(value) and value.device.type == "cpu" else value


_RULES: Final[dict[type[Optimizer], StepRule]] = {
    SGD: StepRule(_sgd, rotated=False, decays_only=True),
    Adam: StepRule(_adam, rotated=True, decays_only=True),
    AdamW: StepRule(_adam, rotated=True, decays_only=True),
    NAdam: StepRule(_nadam, rotated=True, decays_only=True),
    RAdam: StepRule(_radam, rotated=True, decays_only=True),
    Adamax: StepRule(_adamax, rotated=True, decays_only=True),
    Adagrad: StepRule(_adagrad, rotated=True, decays_only=True),
    Adadelta: StepRule(_adadelta, rotated=True, decays_only=True),
    RMSprop: StepRule(_rmsprop, rotated=True, decays_only=True),
}
