"""The penalty's gradient for tensors that are computed from parameters, such as W + BA."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rotate_ewc._utils.messages import quoted
from rotate_ewc.linalg.quadratic import quadratic_form
from rotate_ewc.penalty.consolidated import ConsolidatedTasks
from rotate_ewc.penalty.terms import Stack
from rotate_ewc.penalty.updates.gradient import GradientUpdate
from rotate_ewc.penalty.updates.step import Step


class ViewedUpdate(GradientUpdate):
    """Add `λ Jᵀ F (w(θ) - w*)` to the gradients, and take it away after the step.

    θ are the parameters that are stepped, w(θ) the protected tensors, a function of them with the
    Jacobian J. What the new task's gradient is in the space of w cannot be known from that of θ,
    but the part of it that θ can follow can: where a step along the gradient g of θ would move w,
    `J g`. The strength is found from that.
    """

    def __init__(
        self, penalty: ConsolidatedTasks, view: Callable[[], Mapping[str, Tensor]]
    ) -> None:
        """Take part in no step yet.

        Args:
            penalty: The penalty.
            view: Returns w by name, so that gradients reach θ.
        """
        super().__init__(penalty)
        self._view = view

    def before(self, step: Step) -> None:
        """Add the penalty's gradient."""
        names = [name for name in step.groups if step.parameters[name].requires_grad]
        parameters = [step.parameters[name] for name in names]
        with torch.enable_grad():
            viewed = self._view()
            found = self.penalty.protected(viewed)
            stacks = [
                stack
                for stack in self.penalty.stacks
                if any(key in found and found[key].requires_grad for key in stack.block.parameters)
            ]
            gradients = self._gradients(stacks, viewed, parameters)
        along = [step.gradients[name] for name in names]
        moved = self._moved(stacks, viewed, parameters, along, step)
        self._watch.before(stacks, moved)
        for name, parameter, gradient in zip(names, parameters, gradients, strict=True):
            if gradient is not None:
                whole = step.gradients[name] + gradient.to(parameter.dtype) * step.factor(name)
                self.stand_ins.put(parameter, whole)
            self.stand_ins.restart(step.optimizer, parameter, 0)

    def after(self, step: Step) -> None:
        """Take the gradient away."""
        super().after(replace(step, parameters=self._view()) if self._watch.looks else step)

    def _gradients(
        self,
        stacks: Sequence[Stack],
        viewed: Mapping[str, Tensor],
        parameters: Sequence[Tensor],
    ) -> Sequence[Tensor | None]:
        """Return the penalty's gradient for each parameter; None where it does not depend on it."""
        gradients: Sequence[Tensor | None] = [None] * len(parameters)
        if stacks and parameters:
            deltas = self.penalty.deltas(viewed)
            value = quadratic_form([stack.block for stack in stacks], deltas)
            value = 0.5 * self.penalty.scale * value
            # The strength is found from the same graph.
            keep = self._watch.watches
            gradients = torch.autograd.grad(value, parameters, retain_graph=keep, allow_unused=True)
        if all(gradient is None for gradient in gradients):
            protected = quoted(name for stack in self.penalty.stacks for name in stack.names)
            raise ValueError(
                f"none of the protected tensors ({protected}) depends on a parameter that the "
                f"optimizer has and that got a gradient, as if the adapters had been merged, "
                f"switched off or removed; expected adapters that are being trained, or detach() "
                f"before they are removed"
            )
        return gradients

    def _moved(
        self,
        stacks: Sequence[Stack],
        viewed: Mapping[str, Tensor],
        parameters: Sequence[Tensor],
        along: Sequence[Tensor],
        step: Step,
    ) -> Step:
        """Return the step as one of the protected tensors, along `J g` in place of a gradient."""
        if not self._watch.watches:
            return step
        names = [name for stack in stacks for name in stack.names if name in viewed]
        moving = [name for name in names if viewed[name].requires_grad]
        directions = _forward_products([viewed[name] for name in moving], parameters, along)
        gradients = {name: torch.zeros_like(viewed[name]) for name in names}
        gradients.update(zip(moving, directions, strict=True))
        return replace(
            step,
            parameters=viewed,
            gradients=gradients,
            groups={key: {} for key in names},
        )


def _forward_products(
    values: Sequence[Tensor], parameters: Sequence[Tensor], along: Sequence[Tensor]
) -> list[Tensor]:
    """Return J v for values w and a direction v, from `∂(Jᵀu)ᵀv / ∂u`: two backward passes."""
    with torch.enable_grad():
        weights = [torch.zeros_like(value, requires_grad=True) for value in values]
        pulled = torch.autograd.grad(
            values, parameters, weights, create_graph=True, allow_unused=True
        )
        used = [(p, v) for p, v in zip(pulled, along, strict=True) if p is not None]
        products = torch.autograd.grad(
            [p for p, _ in used], weights, [v.to(p.dtype) for p, v in used], allow_unused=True
        )
    return [
        torch.zeros_like(value) if product is None else product
        for value, product in zip(values, products, strict=True)
    ]
