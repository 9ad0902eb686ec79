"""An optimizer's step in the coordinates of a penalty: rotated where it protects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rotate_ewc._utils.messages import parameters_have
from rotate_ewc._utils.parameters import fits, protected_slice
from rotate_ewc.linalg.block import shapes_of
from rotate_ewc.penalty.terms import Stack

ByName = Mapping[str, Tensor]


class Rotation:
    """Gradients and displacements from the anchor, for parameters that have a gradient.

    Attributes:
        gradients: By name, in the parameters' shapes. Their protected leading slices are in the
            eigenbasis.
    """

    def __init__(
        self,
        parameters: ByName,
        gradients: ByName,
        stacks: Sequence[Stack],
        deltas: ByName,
        scale: float,
    ) -> None:
        """Rotate; nothing is changed, also if this raises.

        Args:
            parameters: All of the model's, by name.
            gradients: Those there are, by name.
            stacks: Stacks of one term each.
            deltas: `θ - θ*` by the stacks' own names, `[1, *shape]`.
            scale: What the eigenvalues are multiplied with.

        Raises:
            ValueError: If only one half of a joint block has a gradient.
        """
        self.gradients = dict(gradients)
        self._parameters = parameters
        self._scale = scale
        self._displacements: dict[str, Tensor] = {}
        self._eigenvalues: dict[str, Tensor] = {}
        self._stacks = [stack for stack in stacks if self._moves(stack)]
        for stack in self._stacks:
            self._rotate(stack, deltas)

    def move(self, name: str, step: Tensor, sizes: Tensor) -> None:
        """Take a step, and where the parameter is protected the proximal step after it.

        Args:
            name: A parameter that has a gradient.
            step: The optimizer's step, in the shape and coordinates of the gradient.
            sizes: η, the size of a step for a gradient of one, in the same shape.
        """
        parameter = self._parameters[name]
        eigenvalues = self._eigenvalues.get(name)
        if eigenvalues is None:
            parameter.sub_(step)
            return
        inner = tuple(map(slice, eigenvalues.shape))
        if eigenvalues.shape != parameter.shape:
            # The protected slice is moved too, but will be set from its displacement.
            parameter.sub_(step)
        # Finite, because infinity times a size or an eigenvalue of zero would not be a number.
        largest = torch.finfo(eigenvalues.dtype).max
        stiffness = (min(self._scale, largest) * eigenvalues).clamp_(max=largest)
        self._displacements[name].sub_(step[inner]).div_(1.0 + sizes[inner] * stiffness)

    def write_back(self) -> None:
        """Rotate the displacements back, and set the parameters to them."""
        for stack in self._stacks:
            block = stack.block
            by_key = {key: self._displacements[name][None] for key, name, _ in stack.members}
            moved = block.unrotate(block.gather(by_key), shapes_of(by_key))
            for key, name, anchor in stack.members:
                target = protected_slice(name, self._parameters, anchor[0])
                target.copy_(anchor[0] + moved[key][0])

    def _moves(self, stack: Stack) -> bool:
        """Whether a stack's parameters have gradients: all of them, or none.

        Where one does not fit any more, the whole block is left out, as when merging.
        """
        if not all(fits(name, self._parameters, anchor[0]) for _, name, anchor in stack.members):
            return False
        without = [name for name in stack.names if name not in self.gradients]
        if 0 < len(without) < len(stack.names):
            raise ValueError(
                f"{parameters_have(without)} no gradient, but shares a block with others that "
                f"have, {list(stack.names)}: no step of these alone is right. Train all of them, "
                f"or consolidate with separate_weight_and_bias=True"
            )
        return not without

    def _rotate(self, stack: Stack, deltas: ByName) -> None:
        block = stack.block
        gradients = {
            key: protected_slice(name, self.gradients, anchor[0])[None]
            for key, name, anchor in stack.members
        }
        shapes = {key: anchor.shape[1:] for key, _, anchor in stack.members}
        rotated_gradients = block.split(block.rotate(gradients), shapes)
        rotated_deltas = block.split(block.rotate(deltas), shapes)
        eigenvalues = block.split(block.eigenvalues, shapes)
        for key, name, _ in stack.members:
            gradient = rotated_gradients[key]
            self._displacements[name] = rotated_deltas[key]
            self._eigenvalues[name] = eigenvalues[key]
            whole = self.gradients[name].to(gradient.dtype, copy=True)
            whole[tuple(map(slice, gradient.shape))] = gradient
            self.gradients[name] = whole
