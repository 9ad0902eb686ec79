"""The penalty's tangent plane in every step, and the penalty itself now and then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from torch import Tensor

from rotate_ewc._utils.parameters import protected_slice
from rotate_ewc.io.snapshot import checked_tensor
from rotate_ewc.linalg.quadratic import quadratic_gradient
from rotate_ewc.penalty.consolidated import ConsolidatedTasks
from rotate_ewc.penalty.step_rules import StepRule, divided
from rotate_ewc.penalty.terms import Stack
from rotate_ewc.penalty.updates.base import Update, check_nothing_left, take_count
from rotate_ewc.penalty.updates.gradient import add_gradients
from rotate_ewc.penalty.updates.step import Step
from rotate_ewc.penalty.updates.watching import STEPS_BETWEEN_LOOKS, Watch

# Beyond this a step is as good as infinite; with it, products with eigenvalues are still finite.
_LARGEST_FACTOR: Final = 1e28


class TangentUpdate(Update):
    """Add the gradient p of the tangent plane at θ₀; after every k steps, take the next plane.

    What the plane leaves out, ½ λ (θ - θ₀)ᵀ F (θ - θ₀), has no gradient at θ₀, and its implicit
    step is elementwise in the eigenbasis. With η what k steps make of a gradient of one, in the
    geometric mean over the entries of a parameter that moved,

        c = Q [Λ ∘ Qᵀ(θ - θ₀) / (1 + η λ Λ)],    θ₁ = θ - η λ c,    p ← p + λ c = ∇P(θ₁)

    It rests where the gradients cancel, whatever η is, and is stable where a gradient that is k
    steps old would not be. Four products for each block, every k steps.
    """

    steps_between_looks = STEPS_BETWEEN_LOOKS

    def __init__(self, penalty: ConsolidatedTasks, rule: StepRule, every: int) -> None:
        """Keep the rule for the size of the optimizer's steps, and k."""
        super().__init__(penalty)
        self._rule = rule
        self._every = every
        self._steps = 0
        self._watch = Watch(self)
        self._stepped: frozenset[str] = frozenset()
        self._stacks: Sequence[Stack] = ()
        self._contact: dict[str, Tensor] = {}
        self._gradients: dict[str, Tensor] = {}

    def before(self, step: Step) -> None:
        """Add the gradient of the plane."""
        if self._stacks is self.penalty.stacks:
            self.penalty.protected(step.parameters)
        else:
            self._begin(step)
        self._watch.before(self._stacks, step)
        add_gradients(self, step, self._gradients)

    def acts_after(self) -> bool:
        """Return whether the next plane is due, or the strength to be found."""
        return self._watch.looks or self._steps + 1 >= self._every

    def after(self, step: Step) -> None:
        """Count the step, and take the next plane where it is time."""
        super().after(step)
        self._watch.after(step)
        self._steps += 1
        self._stepped = frozenset(step.groups)
        if self._steps >= self._every:
            self._renew(step)

    def flush(self, step: Step) -> None:
        """Take the next plane early."""
        if self._steps and self._stacks is self.penalty.stacks:
            # An optimizer that has forgotten its state does not know how far it went.
            known = {n for n in self._stepped if not self._rule.rotated or step.state(n)}
            groups = {name: group for name, group in step.groups.items() if name in known}
            self._renew(replace(step, groups=groups))

    def _renew(self, step: Step) -> None:
        step = step.sized(self._rule)
        deltas = self.penalty.deltas(step.parameters)
        for stack in self._stacks:
            self._move(stack, step, deltas)
        self._steps = 0

    def _begin(self, step: Step) -> None:
        deltas = self.penalty.deltas(step.parameters)
        self._gradients = quadratic_gradient([s.block for s in self.penalty.stacks], deltas)
        self._contact = {key: delta.detach().clone() for key, delta in deltas.items()}
        self._stacks, self._steps = self.penalty.stacks, 0

    def _move(self, stack: Stack, step: Step, deltas: Mapping[str, Tensor]) -> None:
        """Move the parameters of one stack, its point of contact and its gradient."""
        block = stack.block
        moved = {key: deltas[key] - self._contact[key] for key in block.parameters}
        present = [name for name in stack.names if name in step.groups]
        members = [(key, name) for key, name, _ in stack.members if name in present]
        sizes = [self._typical_size(name, step, moved[key][0]) for key, name in members]
        size = sum(sizes) / len(sizes) if sizes else 0.0
        factor = min(size * self.penalty.scale, _LARGEST_FACTOR)
        eigenvalues = block.eigenvalues
        implicit = block.with_eigenvalues(eigenvalues / (1.0 + factor * eigenvalues))
        changes = quadratic_gradient([implicit], moved)
        for key, name, anchor in stack.members:
            if name in present:
                shift = factor * changes[key]
                # Without what the parameter's dtype rounds off, which is in the next displacement.
                self._contact[key] = deltas[key] - shift
                protected_slice(name, step.parameters, anchor[0]).sub_(shift[0])
            else:
                self._contact[key] = deltas[key].clone()
            self._gradients[key] = self._gradients[key] + changes[key]
        if 0 < len(present) < len(stack.names):
            # A half that is not trained has not moved along with the other.
            contact = {key: self._contact[key] for key in block.parameters}
            self._gradients.update(quadratic_gradient([block], contact))

    def _typical_size(self, name: str, step: Step, moved: Tensor) -> float:
        """Return the geometric mean of η over the entries that moved; 0 where none did."""
        size = divided(step.size(name, self._rule))
        if not isinstance(size, Tensor) or not size.ndim:
            return self._steps * float(size)
        # An entry that never had a gradient does not move, and its size may be enormous.
        inner = size[tuple(map(slice, moved.shape))][moved != 0]
        return self._steps * float(inner.log().mean().exp()) if inner.numel() else 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return the plane, and how many steps were taken with it."""
        if self._stacks is not self.penalty.stacks:
            return {}
        planes = {"contact": self._contact, "gradient": self._gradients}
        state = {f"{name}/{key}": t for name, by in planes.items() for key, t in by.items()}
        return {**state, "steps": self._steps, "averages": self._watch.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        left = dict(state)
        steps, averages = take_count(left, "steps"), self._watch.checked(left.pop("averages", {}))
        stacks = self.penalty.stacks if left else ()
        found: dict[str, dict[str, Tensor]] = {"contact": {}, "gradient": {}}
        for stack in stacks:
            dtypes = [stack.block.eigenvalues.dtype]
            for key, _, anchor in stack.members:
                for name, tensors in found.items():
                    place = f"{name}/{key}"
                    tensor = checked_tensor(place, left.pop(place, None), anchor.shape, dtypes)
                    tensors[key] = tensor.to(anchor.device, copy=True)
        check_nothing_left(left)
        self._watch.resume(averages)
        self._stacks, self._steps = stacks, steps
        self._contact, self._gradients = found["contact"], found["gradient"]
