"""The proximal step after optimizers that step alike in every orthonormal basis, such as SGD."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rotate_ewc.errors import SnapshotError
from rotate_ewc.penalty.consolidated import ConsolidatedTasks
from rotate_ewc.penalty.displacement import Displacement
from rotate_ewc.penalty.step_rules import StepRule
from rotate_ewc.penalty.terms import Stack
from rotate_ewc.penalty.updates.base import take_count
from rotate_ewc.penalty.updates.displaced import DisplacedUpdate
from rotate_ewc.penalty.updates.step import Step, check_gradients, fits_all
from rotate_ewc.penalty.updates.watching import Watch


class ProximalUpdate(DisplacedUpdate):
    """Let the optimizer step where it is; after every k-th step, take the proximal step.

    Since the optimizer would make the same step in the eigenbasis, nothing need be rotated for it,
    and its state means the same before and after a consolidation. With η the sum of its k step
    sizes, `θ ← θ* + Q [Qᵀ(θ - θ*) / (1 + η λ Λ)]`. Four products for each block, every k steps.
    """

    # The steps of SGD are so short where curvature is small that the bound would be too tight.
    bounds_strength = False

    def __init__(self, penalty: ConsolidatedTasks, rule: StepRule, every: int) -> None:
        """Keep the rule for the size of the optimizer's steps, and k."""
        super().__init__(penalty, rule)
        self._every = every
        self._steps = 0
        self._sums: dict[str, float] = {}
        self._sizes: list[tuple[Displacement, float]] = []
        self._watch = Watch(self)

    def begin(self) -> None:
        """Begin in the eigenbases that the penalty has now, with a step size of zero."""
        super().begin()
        self._steps, self._sums = 0, {}

    def before(self, step: Step) -> None:
        """Find out how far the optimizer will go."""
        moving = self.moving(step)
        self._watch.before([d.stack for d in moving], step)
        self._sizes = [(d, self._size(d.stack, step)) for d in moving]
        for displacement in moving:
            gradients = [step.gradients[name] for name in displacement.stack.names]
            check_gradients([displacement.stack] * len(gradients), gradients)
        for name in step.groups:
            self.stand_ins.restart(step.optimizer, step.held(name), 0)

    def acts_after(self) -> bool:
        """Return whether the proximal step is due, or the strength to be found."""
        return self._watch.looks or self._steps + 1 >= self._every

    def after(self, step: Step) -> None:
        """Count the step, and take the proximal one where it is time."""
        super().after(step)
        self._watch.after(step)
        self._steps += 1
        for displacement, size in self._sizes:
            key = displacement.stack.block.label
            self._sums[key] = self._sums.get(key, 0.0) + size
        self._sizes = []
        if self._steps >= self._every:
            self.flush(step)

    def flush(self, step: Step) -> None:
        """Take the proximal step for all steps since the last one."""
        if self._stacks is not self.penalty.stacks:
            return  # these steps were taken before a consolidation
        sums, self._sums, self._steps = self._sums, {}, 0
        for displacement in self.displacements:
            size = sums.get(displacement.stack.block.label, 0.0)
            if size and fits_all(displacement.stack, step):
                self._shrink(displacement, size, step)

    def _shrink(self, displacement: Displacement, size: float, step: Step) -> None:
        displacement.follow(step.parameters)
        shrinking = displacement.split(1.0 + size * self.stiffness(displacement.stack))
        coordinates = {k: z / shrinking[k] for k, z in displacement.coordinates.items()}
        displacement.lead(step.parameters, coordinates)

    def _size(self, stack: Stack, step: Step) -> float:
        return float(self.rule.size(step.groups[stack.names[0]], {}))

    def state_dict(self) -> dict[str, Any]:
        """Return the coordinates, and how far the optimizer went since the last proximal step."""
        if self._stacks is not self.penalty.stacks:
            return {}  # these steps were taken before a consolidation
        return {
            **super().state_dict(),
            "steps": self._steps,
            "sums": dict(self._sums),
            "averages": self._watch.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        left = dict(state)
        steps, sums = take_count(left, "steps"), self._checked_sums(left.pop("sums", {}))
        averages = self._watch.checked(left.pop("averages", {}))
        super().load_state_dict(left)
        self._watch.resume(averages)
        self._steps, self._sums = steps, sums

    def _checked_sums(self, sums: Any) -> dict[str, float]:
        """Return sums of step sizes by block, or raise `SnapshotError`."""
        labels = {stack.block.label for stack in self.penalty.stacks}
        if not isinstance(sums, Mapping) or not all(
            key in labels and isinstance(value, float) and 0.0 <= value < math.inf
            for key, value in sums.items()
        ):
            raise SnapshotError(
                "the state of the handle has other 'sums' than a number, at least 0, for some "
                "blocks of its penalty; expected what the handle's state_dict() returned: load the "
                "penalty's own state first, and then an unchanged copy"
            )
        return dict(sums)
