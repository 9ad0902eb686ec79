"""Finding the strength in the steps of optimizers that are not rotated for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from torch import Tensor

from rotate_ewc._utils.parameters import protected_slice
from rotate_ewc.penalty.plasticity import Progress
from rotate_ewc.penalty.step_rules import StepRule
from rotate_ewc.penalty.terms import Stack
from rotate_ewc.penalty.updates.base import Step, Update, fits_all

_TINY: Final = 1e-30


class Watch:
    """Looks at an update's steps, of which it keeps what there was before."""

    def __init__(self, update: Update, rule: StepRule | None) -> None:
        """Look at no step yet.

        Args:
            update: Whose penalty is to be found a strength for.
            rule: That of the optimizer; None if there is none.
        """
        self._update = update
        self._rule = rule
        self._blocks: list[_Block] = []

    def before(self, stacks: Sequence[Stack], step: Step) -> None:
        """Keep what a step will change, if it is to be looked at."""
        self._blocks = [
            _Block(stack, step)
            for stack in (stacks if self._update.looks() else ())
            if fits_all(stack, step) and all(name in step.groups for name in stack.names)
        ]

    def after(self, step: Step) -> None:
        """Find the strength in what a step has changed."""
        scale = self._update.penalty.scale_of_one
        seen = {b.label: b.progress(step, self._rule, scale) for b in self._blocks}
        if seen:
            self._update.find_strength(seen)
        self._blocks = []


class _Block:
    """A block before a step.

    Attributes:
        label: Its name.
    """

    def __init__(self, stack: Stack, step: Step) -> None:
        """Keep the gradient of the loss, and where the parameters are."""
        self.label = stack.block.label
        self._stack = stack
        self._gradient = stack.block.rotate(
            {key: protected_slice(n, step.gradients, a[0]) for key, n, a in stack.members}
        )
        self._before = {
            key: protected_slice(n, step.parameters, a[0]).detach().clone()
            for key, n, a in stack.members
        }

    def progress(self, step: Step, rule: StepRule | None, scale: float) -> Progress:
        """Return what the step has done, with one step size for the whole block.

        Args:
            step: The step, which has been taken.
            rule: That of the optimizer; None measures how far it went for the gradient it had.
            scale: What the eigenvalues are multiplied with at strength 1.
        """
        block = self._stack.block
        moved = {
            key: protected_slice(n, step.parameters, a[0]).detach() - self._before[key]
            for key, n, a in self._stack.members
        }
        rotated = block.rotate(moved)
        if rule is None:
            size = float(rotated.norm()) / max(float(self._gradient.norm()), _TINY)
        else:
            sizes = [typical_size(rule, step, n, moved[k]) for k, n, _ in self._stack.members]
            size = sum(sizes) / len(sizes)
        eigenvalues = block.eigenvalues
        gains = rotated.square() / max(size, _TINY)
        return Progress(gains, eigenvalues * (size * scale), self._gradient.square(), eigenvalues)


def typical_size(rule: StepRule, step: Step, name: str, moved: Tensor) -> float:
    """Return η of a parameter: the geometric mean over the entries that moved, 0 where none did.

    Args:
        rule: That of the optimizer.
        step: A step that has been taken.
        name: The parameter.
        moved: By how much its protected part has moved.
    """
    size = rule.size(step.groups[name], step.state(name) if rule.rotated else {})
    if not isinstance(size, Tensor) or not size.ndim:
        return float(size)
    # An entry that never had a gradient does not move, and its size may be enormous.
    inner = size[tuple(map(slice, moved.shape))][moved != 0]
    return float(inner.log().mean().exp()) if inner.numel() else 0.0
