"""Finding the strength in the steps of optimizers that do not step in the eigenbasis."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from rotate_ewc._utils.parameters import protected_slice
from rotate_ewc.errors import SnapshotError
from rotate_ewc.io.snapshot import checked_tensor
from rotate_ewc.penalty.plasticity import Progress
from rotate_ewc.penalty.terms import Stack
from rotate_ewc.penalty.updates.base import Update
from rotate_ewc.penalty.updates.step import Step, fits_all, rotated_gradient

_BETAS: Final = (0.9, 0.999)
_EPS: Final = 1e-8
STEPS_BETWEEN_LOOKS: Final = 100
_STEPS_BEFORE_A_LOOK: Final = 10


class Watch:
    """Looks at steps as if they were Adam's in the eigenbasis, and as long as they are.

    What an optimizer's own progress is depends on its metric: that of SGD is nearly all in the
    directions of large gradients, which are those of large eigenvalues. For a strength that does
    not depend on it, Adam's averages m and v are kept in the eigenbasis in the last steps before
    each look, which is at the step `s = η m`, `η = r / √v`, with r such that the length is that of
    the step that was taken. Two products for each block in these steps: one of nine, or, where all
    steps are in the eigenbasis (SGD), every step of the task in which the strength is found.
    """

    def __init__(self, update: Update) -> None:
        """Look at no step yet.

        Args:
            update: Whose penalty is to be found a strength for.
        """
        self._update = update
        self._averages: dict[Stack, Averages] = {}
        self.looks = False
        # The gradients of the step at hand, until it has been taken.
        self._gradients: list[tuple[Stack, Tensor]] = []
        self._before: dict[str, Tensor] = {}

    @property
    def watches(self) -> bool:
        """Whether the gradients of the next step are averaged."""
        return self._update.wait <= _STEPS_BEFORE_A_LOOK

    def before(self, stacks: Sequence[Stack], step: Step) -> None:
        """Find the gradients of the loss, and keep where a step begins that is to be looked at.

        Args:
            stacks: All stacks that may be stepped.
            step: The step.
        """
        self._gradients, self.looks = [], False
        penalty = self._update.penalty
        watches, due = self.watches, self._update.looks()
        if not watches:
            self._averages = {}
            return
        current = set(penalty.stacks)
        self._averages = {stack: a for stack, a in self._averages.items() if stack in current}
        gradients = [(stack, rotated_gradient(stack, step)) for stack in _moving(stacks, step)]
        squares = [gradient.square().sum() for _, gradient in gradients]
        endless = sum(not bool(torch.isfinite(square)) for square in squares)
        if any(penalty.owners.total([endless])):
            return  # the averages would never recover
        self._gradients, self.looks = gradients, due
        if self.looks:
            self._before = {
                key: protected_slice(name, step.parameters, anchor[0]).detach().clone()
                for stack, _ in gradients
                for key, name, anchor in stack.members
            }

    def after(self, step: Step) -> None:
        """Average the gradients, and find the strength, if the step is to be looked at."""
        gradients, self._gradients = self._gradients, []
        for stack, gradient in gradients:
            self._averages.setdefault(stack, Averages(gradient)).add(gradient)
        if not self.looks:
            return
        looked_at = [stack for stack, _ in gradients]
        moved = [
            protected_slice(name, step.parameters, anchor[0]).detach() - self._before[key]
            for stack in looked_at
            for key, name, anchor in stack.members
        ]
        corrected = [self._averages[stack].corrected() for stack in looked_at]
        squares = _squares(moved), _squares([m / v for m, v in corrected])
        length, own_length = map(math.sqrt, self._update.penalty.owners.total(squares))
        rate = length / max(own_length, _EPS)
        scale = self._update.penalty.scale_of_one
        seen = []
        for stack, (mean, root) in zip(looked_at, corrected, strict=True):
            sizes, eigenvalues = rate / root, stack.block.spectrum
            stiffnesses = sizes * eigenvalues * scale
            seen.append(Progress(mean.square() * sizes, stiffnesses, eigenvalues))
        self._before, self.looks = {}, False
        self._update.find_strength(seen, step)

    def state_dict(self) -> dict[str, Any]:
        """Return the averages, as far as they are in the eigenbases that the penalty has now."""
        current = set(self._update.penalty.stacks)
        return {
            stack.block.label: averages.state_dict()
            for stack, averages in self._averages.items()
            if stack in current
        }

    def checked(self, state: Mapping[str, Any]) -> dict[Stack, Averages]:
        """Return what `resume` takes of what `state_dict` returned, or raise `SnapshotError`."""
        stacks = {stack.block.label: stack for stack in self._update.penalty.stacks}
        if not isinstance(state, Mapping) or not set(state) <= set(stacks):
            raise SnapshotError(
                "the state of the handle has averages of other blocks; expected those of its "
                "penalty: load the penalty's own state first (and with sharded=True the state that "
                "this process has saved)"
            )
        return {
            stacks[label]: Averages.from_state_dict(stacks[label], label, value)
            for label, value in state.items()
        }

    def resume(self, averages: Mapping[Stack, Averages]) -> None:
        """Go on with averages."""
        self._averages = dict(averages)


class Averages:
    """Adam's averages of a block's gradients, `[groups, d_out, d_in]`."""

    def __init__(self, like: Tensor) -> None:
        """Begin without a gradient, for those of a shape and dtype."""
        self._mean, self._square = torch.zeros_like(like), torch.zeros_like(like)
        self._steps = 0

    def add(self, gradient: Tensor) -> None:
        """Take a gradient in."""
        first, second = _BETAS
        self._mean.lerp_(gradient, 1.0 - first)
        self._square.lerp_(gradient.square(), 1.0 - second)
        self._steps += 1

    def corrected(self) -> tuple[Tensor, Tensor]:
        """Return m and √v + ε, corrected for the bias of the first steps."""
        first, second = (1.0 - beta**self._steps for beta in _BETAS)
        return self._mean / first, (self._square / second).sqrt_().add_(_EPS)

    def state_dict(self) -> dict[str, Any]:
        """Return copies, and how many gradients were taken in."""
        # In one layout, whatever that of the block.
        mean, square = (
            t.clone(memory_format=torch.contiguous_format) for t in (self._mean, self._square)
        )
        return {"m": mean, "v": square, "steps": self._steps}

    @classmethod
    def from_state_dict(cls, stack: Stack, label: str, state: Mapping[str, Any]) -> Averages:
        """Take over what `state_dict` returned, or raise `SnapshotError`."""
        like = stack.block.spectrum
        new = cls(like)
        found = dict(state) if isinstance(state, Mapping) else {}
        steps = found.get("steps")
        if not isinstance(steps, int) or steps < 1:
            raise SnapshotError(
                f"the state of the handle has {steps!r} steps in the averages of {label!r}; "
                f"expected a positive integer"
            )
        new._steps = steps
        for name, own in (("m", new._mean), ("v", new._square)):
            place = f"{label}/{name}"
            own.copy_(checked_tensor(place, found.get(name), like.shape, [like.dtype]))
        return new


def _moving(stacks: Sequence[Stack], step: Step) -> list[Stack]:
    """Return the stacks all of whose parameters are stepped."""
    return [
        stack
        for stack in stacks
        if fits_all(stack, step) and all(name in step.groups for name in stack.names)
    ]


def _squares(tensors: Sequence[Tensor]) -> float:
    return sum(float(tensor.square().sum()) for tensor in tensors)
