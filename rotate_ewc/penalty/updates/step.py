"""A step of an optimizer, what stands in for what it had, and the stacks that it moves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any, Final

import torch
from torch import Tensor
from torch.optim import Adagrad, Optimizer

from rotate_ewc._utils.messages import parameters_have, quoted
from rotate_ewc._utils.parameters import fits, protected_slice
from rotate_ewc.distributed.sharding import is_sharded, own_numbers, spread_like, write_
from rotate_ewc.errors import NotFiniteError
from rotate_ewc.penalty.owners import Owners
from rotate_ewc.penalty.step_rules import Quotient, StepRule, StepSize
from rotate_ewc.penalty.terms import Stack

# In an optimizer's state of a parameter: the number of tasks in whose eigenbasis it is. It is saved
# and loaded with the state, so that a resumed run knows.
_BASIS: Final = "eigenbasis_of_tasks"


@dataclass(frozen=True)
class Step:
    """A step that an optimizer is about to take, or has taken.

    Attributes:
        optimizer: The optimizer.
        parameters: All of the model's, by name.
        gradients: Those of the parameters that the optimizer has, as far as there are any.
        groups: The options for each of these.
        sharded: Those that are spread over processes, and with `sharded=True` all that are
            protected. In `parameters` and `gradients` are all numbers of those that this process
            owns; `spread` writes what has become of them into the parameters of all processes.
        owners: The owners.
        sizes: Step sizes that are spread over processes, whole; `sized` finds them.
    """

    optimizer: Optimizer
    parameters: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]
    groups: Mapping[str, Mapping[str, Any]]
    sharded: Mapping[str, Tensor] = field(default_factory=dict)
    owners: Owners = field(default_factory=Owners)
    sizes: Mapping[str, StepSize | Quotient] = field(default_factory=dict)

    def held(self, name: str) -> Tensor:
        """Return a parameter as the optimizer has it."""
        return self.sharded.get(name, self.parameters[name])

    def state(self, name: str) -> dict[str, Any]:
        """Return the optimizer's state of a parameter."""
        state: dict[str, Any] = self.optimizer.state[self.held(name)]
        return state

    def collect(self) -> Step:
        """Return the step with the numbers that sharded parameters have now."""
        if not self.sharded:
            return self
        found = self.owners.gathered(self.sharded)
        return replace(self, parameters={**self.parameters, **found})

    def spread(self) -> None:
        """Give sharded parameters the numbers that they have at their owners."""
        own = {n: {"whole": self.parameters[n]} for n in self.sharded if self.owners.has(n)}
        for name, found in self.owners.handed_out("parameters", own):
            write_(self.sharded[name], found["whole"])

    def sized(self, rule: StepRule) -> Step:
        """Return the step with the step sizes of sharded parameters, after it was taken."""
        if not self.sharded:
            return self
        found = {n: self.size(n, rule) for n in self.sharded if n in self.groups}
        scales = {n: s.scale if isinstance(s, Quotient) else s for n, s in found.items()}
        whole = self.owners.gathered({n: s for n, s in scales.items() if isinstance(s, Tensor)})
        sizes = {
            name: size._replace(scale=whole[name]) if isinstance(size, Quotient) else whole[name]
            for name, size in found.items()
            if name in whole
        }
        return replace(self, sizes=sizes)

    def size(self, name: str, rule: StepRule) -> StepSize | Quotient:
        """Return the step size of a parameter, perhaps not divided yet, after the step."""
        if name in self.sizes:
            return self.sizes[name]
        return rule.quotient(self.groups[name], self.state(name) if rule.rotated else {})

    def rate(self, names: Iterable[str]) -> float:
        """Return the largest learning rate of parameters; 1 where an optimizer has none.

        Args:
            names: Their names; if none of them is stepped, as with views, all that are stepped.
        """
        groups = [self.groups[name] for name in names if name in self.groups]
        given = [group.get("lr") for group in groups or self.groups.values()]
        # Schedules that are computed with NumPy make its numbers of them.
        rates = [float(rate) for rate in given if isinstance(rate, (Real, Tensor))]
        return max((rate for rate in rates if 0 < rate < math.inf), default=1.0)

    def factor(self, name: str) -> Tensor | float:
        """Return what gradients of a parameter are multiplied with, for the optimizer to divide by.

        It may maximise, or undo the scaling of a `GradScaler` by itself, as fused ones do.
        """
        scale: Tensor | None = getattr(self.optimizer, "grad_scale", None)
        sign = -1.0 if self.groups[name].get("maximize") else 1.0
        return sign if scale is None else sign * scale


@dataclass
class StandIns:
    """What parameters were before a step: it is taken with other values, gradients and states."""

    _kept: list[tuple[Tensor, Tensor | None, Tensor | None]] = field(default_factory=list)
    _states: list[tuple[Optimizer, Tensor, dict[str, Any] | None]] = field(default_factory=list)

    def put(self, parameter: Tensor, gradient: Tensor, data: Tensor | None = None) -> None:
        """Give a parameter another gradient, and other data if there are any."""
        if is_sharded(parameter):
            # A DTensor's data cannot be exchanged, since FSDP2 reads where they were.
            own = own_numbers(parameter)
            self._kept.append((parameter, None if data is None else own.clone(), parameter.grad))
            if data is not None:
                write_(parameter, data)
            parameter.grad = spread_like(gradient, parameter)
            return
        self._kept.append((parameter, None if data is None else parameter.data, parameter.grad))
        if data is not None:
            parameter.data = data
        parameter.grad = gradient

    def restart(self, optimizer: Optimizer, parameter: Tensor, tasks: int) -> None:
        """Have an optimizer forget what it knows of a parameter in another basis than this one."""
        state = optimizer.state.get(parameter)
        if not state:
            if tasks:  # what the step is about to begin has no note yet that it is in an eigenbasis
                self._states.append((optimizer, parameter, None if state is None else {}))
        elif state.get(_BASIS, 0) != tasks:
            self._states.append((optimizer, parameter, state))
            optimizer.state[parameter] = _first_state(optimizer, state)

    def take_back(self) -> None:
        """Give the parameters back what they had; what has become of the other data is dropped."""
        for parameter, data, gradient in self._kept:
            if data is not None and is_sharded(parameter):
                own_numbers(parameter).copy_(data)
            elif data is not None:
                parameter.data = data
            parameter.grad = gradient
        self._kept.clear()
        self._states.clear()

    def undo(self) -> None:
        """Take everything back, also the states that were restarted or begun in an eigenbasis."""
        states = list(self._states)
        self.take_back()
        for optimizer, parameter, state in states:
            if state is None:
                optimizer.state.pop(parameter, None)
            else:
                optimizer.state[parameter] = state


def mark_basis(state: dict[str, Any], tasks: int) -> None:
    """Note in a parameter's state in whose eigenbasis it is; 0 is the standard basis."""
    if tasks and state:
        state[_BASIS] = tasks
    else:
        state.pop(_BASIS, None)


def restart_all(optimizer: Optimizer) -> None:
    """Have an optimizer forget what it knows of parameters in any eigenbasis."""
    stand_ins = StandIns()
    for parameter in list(optimizer.state):
        if isinstance(parameter, Tensor):
            stand_ins.restart(optimizer, parameter, 0)


def _first_state(optimizer: Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state of a parameter before its first step."""
    if not isinstance(optimizer, Adagrad):
        return {}
    # It makes its states in the constructor.
    first = optimizer.defaults["initial_accumulator_value"]
    return {
        "step": torch.zeros_like(state["step"]),
        "sum": torch.full_like(state["sum"], first),
    }


def moving_stacks(stacks: Iterable[Stack], step: Step) -> list[Stack]:
    """Return the stacks whose parameters are stepped.

    Where one does not fit any more (`strict=False`), the whole block is left out, as when merging.

    Raises:
        ValueError: If only one half of a joint block is stepped, or the two differ in options.
    """
    return [stack for stack in stacks if _moves(stack, step)]


def fits_all(stack: Stack, step: Step) -> bool:
    """Whether the model has all parameters of a stack, as large as they were at least."""
    return all(fits(name, step.parameters, anchor[0]) for _, name, anchor in stack.members)


def rotated_gradient(
    stack: Stack, step: Step, finish: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Return the loss's gradient of a stack in its eigenbasis, `[groups, d_out, d_in]`, a new one.

    Args:
        stack: The stack.
        step: The step.
        finish: What to make of the products, as in `Block.rotate`.
    """
    block = stack.block
    # Where nothing is rotated, it would be the user's own.
    copies = block.gradient_basis is None and block.activation_basis is None
    gradients = {
        key: protected_slice(name, step.gradients, anchor[0]).to(
            block.eigenvalues.dtype, copy=copies
        )
        for key, name, anchor in stack.members
    }
    return block.rotate(gradients, finish=finish)


def _moves(stack: Stack, step: Step) -> bool:
    if not fits_all(stack, step):
        return False
    without = [name for name in stack.names if name not in step.groups]
    if 0 < len(without) < len(stack.names):
        raise ValueError(
            f"{parameters_have(without)} no gradient in this optimizer, but shares a block with "
            f"others that have one, {list(stack.names)}: a step of these alone is wrong. Train all "
            f"of them, or consolidate with separate_weight_and_bias=True"
        )
    if not without:
        _check_same_options(stack, step)
    return not without


def _check_same_options(stack: Stack, step: Step) -> None:
    groups = [step.groups[name] for name in stack.names]
    if all(group is groups[0] for group in groups):
        return
    for option in step.optimizer.defaults:
        values = [group[option] for group in groups]
        if any(value is not values[0] and bool(value != values[0]) for value in values):
            given = ", ".join(f"{n!r} has {v}" for n, v in zip(stack.names, values, strict=True))
            raise ValueError(
                f"the parameters of a joint block have different {option} ({given}); expected the "
                f"same, or a penalty with separate_weight_and_bias=True"
            )


def check_gradients(stacks: Sequence[Stack], gradients: Sequence[Tensor]) -> None:
    """Raise `NotFiniteError` unless the gradients of stacks are finite, naming the parameters."""
    if not gradients:
        return
    # A sum is finite only if every number in it is.
    if bool(torch.isfinite(torch.stack([gradient.sum() for gradient in gradients]).sum())):
        return
    finite = [bool(torch.isfinite(gradient).all()) for gradient in gradients]
    names = [
        name for stack, fine in zip(stacks, finite, strict=True) if not fine for name in stack.names
    ]
    if names:
        raise NotFiniteError(
            f"the gradient of {quoted(names)} is not finite (NaN or infinity), and would spread "
            f"over the whole layer; the step was not taken, and nothing has changed. Look for such "
            f"values in the data, clip gradients, or lower the learning rate; with float16, use a "
            f"GradScaler, which skips such steps"
        )
