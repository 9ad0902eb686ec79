"""`TangentPenalty`: a penalty's tangent plane in every step, the penalty itself now and then."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from rotate_ewc._utils.parameters import fits, parameters_of, protected_slice
from rotate_ewc.errors import SnapshotError
from rotate_ewc.io.header import HEADER, TangentHeader, read_header, write_header
from rotate_ewc.io.snapshot import checked_tensor
from rotate_ewc.linalg.block import shapes_of
from rotate_ewc.linalg.quadratic import quadratic_gradient
from rotate_ewc.penalty.penalty import EKFACPenalty
from rotate_ewc.penalty.proximal import StepSize, check_step_size, step_size_of
from rotate_ewc.penalty.terms import Stack

# Beyond this a step is as good as infinite; with it, products with eigenvalues are still finite.
LARGEST_FACTOR: Final = 1e28


class TangentPenalty:
    """An `EKFACPenalty` in mode `"merged"` at the k-th part of its cost.

    Added to every loss is the tangent plane of the penalty P at a point θ₀, which is a scalar
    product with a constant gradient p. After every k steps of the optimizer `refresh_` takes the
    parameters from θ₀ to the next point of contact by an implicit step, and the plane with them:

        θ₁ ← argmin ½ |θ' - θ|² + η · (P(θ') - tangent(θ')),    p ← ∇P(θ₁)

    The optimizer's steps since θ₀ met the tangent already, so the implicit step is on the remainder
    alone, ½ λ (θ' - θ₀)ᵀ F (θ' - θ₀). In the eigenbasis it is elementwise; both together take the
    four products that value and gradient of the penalty take:

        c = Q [λ Λ ∘ Qᵀ(θ - θ₀) / (1 + η λ Λ)],    θ₁ = θ - η c,    p ← p + c

    It rests where the gradients of loss and penalty cancel, whatever η is, since the remainder has
    none at θ₀. And it is stable where a gradient that is k steps old would not be, if η is about
    what k steps of the optimizer make of a gradient of one.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from rotate_ewc import EKFACPenalty, TangentPenalty
        >>> _ = torch.manual_seed(0)
        >>> model, criterion = nn.Linear(4, 3), nn.CrossEntropyLoss()
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> penalty = EKFACPenalty(strength=3.0)
        >>> tangent = TangentPenalty(penalty)
        >>> for task in range(2):
        ...     x, y = torch.randn(16, 4), torch.randint(3, (16,))
        ...     for step in range(1, 21):
        ...         optimizer.zero_grad()
        ...         (criterion(model(x), y) + tangent(model)).backward()
        ...         optimizer.step()
        ...         if step % 10 == 0:
        ...             tangent.refresh_(model, step_size=10 * 0.1)
        ...     penalty.consolidate(model, criterion, [(x, y)])
    """

    def __init__(self, penalty: EKFACPenalty) -> None:
        """Make the tangent of a penalty, at first where the model will be when it is called.

        Args:
            penalty: A penalty in mode `"merged"`.

        Raises:
            TypeError: If `penalty` is something else.
            ValueError: If the penalty's mode is `"separate"`.
        """
        if not isinstance(penalty, EKFACPenalty):
            raise TypeError(f"penalty is {type(penalty).__name__}; expected an EKFACPenalty")
        penalty.check_merged()
        self.penalty = penalty
        self.forget()

    def forget(self) -> None:
        """Drop the tangent, so that the next call takes a new one, as after each consolidation."""
        self._stacks: tuple[Stack, ...] = ()
        self._contact: dict[str, Tensor] = {}
        self._gradients: dict[str, Tensor] = {}
        self._constant = torch.zeros(())

    def state_dict(self) -> dict[str, Any]:
        """Return the snapshot: a flat dictionary of tensors, one of which is the `"header"`.

        With it, a run that is interrupted between two consolidations goes on as if it had not been.
        Without it a new tangent is taken, as after a consolidation.
        """
        state: dict[str, Any] = {HEADER: write_header(TangentHeader(self.penalty.num_tasks))}
        if self._stacks is self.penalty.stacks:
            for name, tensors in (("contact", self._contact), ("gradient", self._gradients)):
                state.update({f"{name}/{key}": tensor for key, tensor in tensors.items()})
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a snapshot, after the penalty has loaded its own.

        Raises:
            SnapshotError: If the snapshot is not whole, not finite, or of another penalty; the
                tangent is then left as it was.
        """
        tasks = read_header(state, TangentHeader).tasks
        if tasks != self.penalty.num_tasks:
            raise SnapshotError(
                f"snapshot is of a penalty with {tasks} tasks, but this one has "
                f"{self.penalty.num_tasks}; load the penalty's own snapshot first"
            )
        stacks = self.penalty.stacks if len(state) > 1 else ()
        found: dict[str, dict[str, Tensor]] = {"contact": {}, "gradient": {}}
        for stack in stacks:
            dtypes = [stack.block.eigenvalues.dtype]
            for key, _, anchor in stack.members:
                for name, tensors in found.items():
                    place = f"{name}/{key}"
                    tensor = checked_tensor(place, state.get(place), anchor.shape, dtypes)
                    tensors[key] = tensor.to(anchor.device, copy=True)
        expected = {HEADER, *(f"{name}/{key}" for name in found for key in found[name])}
        if left_over := sorted(set(state) - expected):
            raise SnapshotError(
                f"snapshot has the unexpected key {left_over[0]!r}; expected those of the tangent "
                f"of this penalty"
            )
        self.forget()
        if stacks:
            self._stacks = stacks
            self._contact, self._gradients = found["contact"], found["gradient"]
            self._touch()

    def __call__(self, model: nn.Module | Mapping[str, Tensor]) -> Tensor:
        """Return the tangent plane's value at the parameters, a scalar tensor.

        Zero before the first task; in the first call after a consolidation, the penalty's own.

        Args:
            model: The model, or its parameters by name.

        Raises:
            ValueError: If a protected parameter is missing or has lost its shape, naming it.
            TypeError: If `model` is neither a module nor a mapping.
        """
        parameters = parameters_of(model)
        if not self.penalty.stacks:
            zero: Tensor = self.penalty(parameters)
            return zero
        if self._stacks is not self.penalty.stacks:
            self._begin(self.penalty.deltas(parameters))
        found = self.penalty.protected(parameters)
        products = [
            torch.dot(self._gradients[key].flatten(), tensor.flatten().to(self._constant.dtype))
            for key, tensor in found.items()
        ]
        value: Tensor = torch.stack(products).sum() - self._constant
        return self.penalty.scale * value

    @torch.no_grad()
    def add_gradient_(self, model: nn.Module) -> None:
        """Add the tangent plane's gradient to `.grad`, which costs half of what the loss would.

        To be called after `backward` (and after a `GradScaler` has unscaled the gradients). For
        parameters that are frozen there is nothing to add; those without a gradient get one.

        Args:
            model: The model.

        Raises:
            ValueError: If a protected parameter is missing or has lost its shape, naming it.
            TypeError: If `model` is no module.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is {type(model).__name__}; expected a torch.nn.Module")
        parameters = parameters_of(model)
        found = self.penalty.protected(parameters)
        if found and self._stacks is not self.penalty.stacks:
            self._begin(self.penalty.deltas(parameters))
        for stack in self._stacks if found else ():
            for key, name, anchor in stack.members:
                if key in found and parameters[name].requires_grad:
                    gradient = protected_slice(name, {name: _gradient(parameters[name])}, anchor[0])
                    gradient.add_(self._gradients[key][0], alpha=self.penalty.scale)

    @torch.no_grad()
    def refresh_(self, model: nn.Module | Mapping[str, Tensor], step_size: StepSize) -> None:
        """Take the implicit step on the remainder, in place, and the tangent where it leads.

        Args:
            model: The model, or its parameters by name.
            step_size: η, the sum of the optimizer's since the last time: for SGD with momentum μ
                k times the learning rate over `1 - μ`. Or one for each parameter, by name, such as
                `step_sizes_of` finds for Adam.

        Raises:
            ValueError: If a step size is out of range, or a protected parameter is missing or has
                lost its shape.
        """
        check_step_size(step_size)
        parameters = parameters_of(model)
        if not self.penalty.stacks:
            return
        deltas = self.penalty.deltas(parameters)
        if self._stacks is not self.penalty.stacks:
            self._begin(deltas)
        factors = {stack: step_size_of(step_size, stack.names) for stack in self._stacks}
        for stack, size in factors.items():
            self._move(stack, parameters, deltas, min(size * self.penalty.scale, LARGEST_FACTOR))
        self._touch()
        if len(self.penalty.protected(parameters)) < len(self._gradients):
            # Parameters that are left out have not moved along with the others of a joint block.
            self.forget()

    def _move(
        self,
        stack: Stack,
        parameters: Mapping[str, Tensor],
        deltas: Mapping[str, Tensor],
        factor: float,
    ) -> None:
        """Move the parameters of one stack, its point of contact and its gradient."""
        block = stack.block
        moved = {key: deltas[key] - self._contact[key] for key in block.parameters}
        weights = block.eigenvalues / (1.0 + factor * block.eigenvalues)
        changes = block.unrotate(block.rotate(moved) * weights, shapes_of(moved))
        for key, name, anchor in stack.members:
            change = changes[key]
            self._gradients[key] = self._gradients[key] + change
            # Without what the parameter's dtype rounds off, which is in the next displacement.
            step = factor * change
            self._contact[key] = deltas[key] - step
            if fits(name, parameters, anchor[0]):
                protected_slice(name, parameters, anchor[0]).sub_(step[0])

    @torch.no_grad()
    def _begin(self, deltas: Mapping[str, Tensor]) -> None:
        """Take the tangent of the penalty as it is now, at the parameters."""
        self._stacks = self.penalty.stacks
        self._contact = {key: delta.detach().clone() for key, delta in deltas.items()}
        blocks = [stack.block for stack in self._stacks]
        self._gradients = quadratic_gradient(blocks, self._contact)
        self._touch()

    def _touch(self) -> None:
        """Make the plane touch the penalty, which is half the product of gradient and distance."""
        constants = [
            torch.dot(self._gradients[key].flatten(), (anchor + 0.5 * self._contact[key]).flatten())
            for stack in self._stacks
            for key, _, anchor in stack.members
        ]
        self._constant = torch.stack(constants).sum()


def _gradient(parameter: Tensor) -> Tensor:
    """Return a parameter's gradient, which may have to be made."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
