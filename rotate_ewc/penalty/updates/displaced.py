"""What the updates share that take the proximal step: displacements, kept between steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rotate_ewc.io.snapshot import checked_tensor
from rotate_ewc.penalty.consolidated import ConsolidatedTasks
from rotate_ewc.penalty.displacement import Displacement
from rotate_ewc.penalty.step_rules import StepRule
from rotate_ewc.penalty.terms import Stack
from rotate_ewc.penalty.updates.base import Update, check_nothing_left
from rotate_ewc.penalty.updates.step import Step, moving_stacks


class DisplacedUpdate(Update):
    """An update that keeps, for every stack, the parameters in its eigenbasis."""

    def __init__(self, penalty: ConsolidatedTasks, rule: StepRule) -> None:
        """Keep the rule for the size of the optimizer's steps."""
        super().__init__(penalty)
        self.rule = rule
        self._stacks: Sequence[Stack] = ()
        self._displacements: dict[Stack, Displacement] = {}
        # λ, and λ Λ, which stays the same for many steps.
        self._stiffnesses: dict[Stack, tuple[float, Tensor]] = {}

    @property
    def displacements(self) -> list[Displacement]:
        """All that are kept."""
        return list(self._displacements.values())

    def moving(self, step: Step) -> list[Displacement]:
        """Return the displacements of all that is stepped, as they were when last used."""
        self.penalty.protected(step.parameters)
        stacks = moving_stacks(self.penalty.stacks, step)
        if self._stacks is not self.penalty.stacks:
            self.begin()
        return [self._displacements.setdefault(stack, Displacement(stack)) for stack in stacks]

    def follow(self, displacements: Sequence[Displacement], step: Step) -> None:
        """Bring displacements up to date where something else has moved the parameters."""
        if not displacements:
            return
        moved = torch.stack([d.moved(step.parameters) for d in displacements]).tolist()
        for displacement, has_moved in zip(displacements, moved, strict=True):
            if has_moved:
                displacement.follow(step.parameters)

    def stiffness(self, stack: Stack) -> Tensor:
        """Return λ Λ, finite, since infinity times a step size of zero would not be a number."""
        scale, eigenvalues = self.penalty.scale, stack.block.spectrum
        known = self._stiffnesses.get(stack)
        if known is None or known[0] != scale:
            largest = torch.finfo(eigenvalues.dtype).max
            known = scale, (min(scale, largest) * eigenvalues).clamp_(max=largest)
            self._stiffnesses[stack] = known
        return known[1]

    def begin(self) -> None:
        """Begin in the eigenbases that the penalty has now."""
        self._stacks = self.penalty.stacks
        self._displacements, self._stiffnesses = {}, {}

    def state_dict(self) -> dict[str, Any]:
        """Return the coordinates of all that was stepped."""
        if self._stacks is not self.penalty.stacks:
            return {}
        return {
            f"coordinates/{key}": tensor
            for displacement in self.displacements
            for key, tensor in displacement.coordinates.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over coordinates, which are used if the parameters are where they lead."""
        found: dict[Stack, Displacement] = {}
        left = dict(state)
        for stack in self.penalty.stacks:
            if f"coordinates/{stack.block.parameters[0]}" not in left:
                continue
            dtypes = [stack.block.eigenvalues.dtype]
            coordinates = {}
            for key, _, anchor in stack.members:
                place = f"coordinates/{key}"
                tensor = checked_tensor(place, left.pop(place, None), anchor.shape[1:], dtypes)
                coordinates[key] = tensor.to(anchor.device, copy=True)
            found[stack] = Displacement(stack)
            found[stack].restore(coordinates)
        check_nothing_left(left)
        self.begin()
        self._displacements = found
