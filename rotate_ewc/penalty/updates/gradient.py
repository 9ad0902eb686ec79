"""The penalty's gradient is added to the loss's, for optimizers of which no step size is known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD

from rotate_ewc._utils.parameters import fits
from rotate_ewc.linalg.quadratic import quadratic_gradient
from rotate_ewc.penalty.consolidated import ConsolidatedTasks
from rotate_ewc.penalty.stability import plain_rate, warn_if_divergent
from rotate_ewc.penalty.updates.base import Update, check_nothing_left
from rotate_ewc.penalty.updates.step import Step
from rotate_ewc.penalty.updates.watching import STEPS_BETWEEN_LOOKS, Watch


class GradientUpdate(Update):
    """Add `λ Q [Λ ∘ Qᵀ(θ - θ*)]` to the gradients before the step, and take it away after it.

    What `penalty(model)` in the loss does, without its value. Large strengths need small learning
    rates. Four products for each block.
    """

    steps_between_looks = STEPS_BETWEEN_LOOKS

    def __init__(self, penalty: ConsolidatedTasks) -> None:
        """Take part in no step yet."""
        super().__init__(penalty)
        self._watch = Watch(self)
        self._warned_of = 0
        self._largest_eigenvalue: tuple[object, float] = (None, 0.0)

    def before(self, step: Step) -> None:
        """Add the penalty's gradient."""
        self._warn_if_divergent(step)
        blocks = [stack.block for stack in self.penalty.stacks]
        gradients = quadratic_gradient(blocks, self.penalty.deltas(step.parameters))
        self._watch.before(self.penalty.stacks, step)
        add_gradients(self, step, gradients)

    def _warn_if_divergent(self, step: Step) -> None:
        """Warn once for each task if plain descent diverges, at the rate and strength of a step."""
        penalty = self.penalty
        searching = self.search.is_to_begin(penalty.num_tasks)
        if searching or self._warned_of == penalty.num_tasks or not isinstance(step.optimizer, SGD):
            return
        if self._largest_eigenvalue[0] is not penalty.stacks:
            self._largest_eigenvalue = penalty.stacks, penalty.largest_eigenvalue
        rate = max(map(plain_rate, step.groups.values()), default=0.0)
        curvature = penalty.scale * self._largest_eigenvalue[1]
        if not warn_if_divergent(rate, curvature, penalty.strength):
            self._warned_of = penalty.num_tasks

    def acts_after(self) -> bool:
        """Return whether the step is one to find the strength from."""
        return self._watch.looks

    def after(self, step: Step) -> None:
        """Take the gradient away."""
        super().after(step)
        self._watch.after(step)

    def state_dict(self) -> dict[str, Any]:
        """Return what the strength is being found from."""
        return {"averages": self._watch.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        left = dict(state)
        averages = self._watch.checked(left.pop("averages", {}))
        check_nothing_left(left)
        self._watch.resume(averages)


def add_gradients(update: Update, step: Step, gradients: Mapping[str, Tensor]) -> None:
    """Give the optimizer gradients to which a penalty's are added, times its scale.

    Args:
        update: The update.
        step: The step.
        gradients: By the stacks' own names, `[1, *shape]`.
    """
    own = {}
    for stack in update.penalty.stacks:
        for key, name, anchor in stack.members:
            if name in step.groups and fits(name, step.parameters, anchor[0]):
                scale = update.penalty.scale * step.factor(name)
                own[name] = {"gradient": _sum(step.gradients[name], gradients[key][0], scale)}
    update.give(step, own)
    for name in step.groups:
        update.stand_ins.restart(step.optimizer, step.held(name), 0)


def _sum(whole: Tensor, part: Tensor, scale: Tensor | float) -> Tensor:
    """Return a tensor whose leading slice has another one, times a number, added to it."""
    alike = part.shape == whole.shape and part.dtype == whole.dtype
    if alike and isinstance(scale, float) and abs(scale) <= torch.finfo(whole.dtype).max:
        return torch.add(whole, part, alpha=scale)  # in one pass through memory
    total = whole.clone()
    total[tuple(map(slice, part.shape))].add_(part * scale)
    return total
