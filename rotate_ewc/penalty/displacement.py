"""Where the parameters of a stack are, in the coordinates of its eigenbasis, kept between steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from rotate_ewc._utils.parameters import protected_slice
from rotate_ewc.linalg.block import shapes_of
from rotate_ewc.penalty.terms import Stack

ByName = Mapping[str, Tensor]


class Displacement:
    """`z = Qᵀ(θ - θ*)` of one stack of one term, up to date with θ without rotating all of θ.

    Kept is z, and the θ that it belongs to. Whatever else moves θ is found by comparing, so that
    also writes through `.data`, which no version counter notices, are heard of; then the difference
    alone is rotated and added. Two products are saved in every step, and no rounding errors of
    rotating there and back pile up: where nothing moves, z is the same for ever.

    Attributes:
        stack: The stack.
        coordinates: z by the stack's own names, in the parameters' shapes.
    """

    def __init__(self, stack: Stack) -> None:
        """Begin at the anchor, where z is zero."""
        dtype = stack.block.eigenvalues.dtype
        self.stack = stack
        self.coordinates = {
            key: torch.zeros_like(anchor[0], dtype=dtype) for key, _, anchor in stack.members
        }
        self._at = {key: anchor[0] for key, _, anchor in stack.members}

    def moved(self, parameters: ByName) -> Tensor:
        """Return whether θ is not where it was, as a tensor that need not be waited for."""
        found = self._found(parameters)
        pairs = [(found[key], at.to(found[key].dtype)) for key, at in self._at.items()]
        if all(tensor.device.type == "cpu" for tensor, _ in pairs):
            return torch.tensor(not all(torch.equal(tensor, at) for tensor, at in pairs))
        return torch.stack([(tensor != at).any() for tensor, at in pairs]).any()

    def follow(self, parameters: ByName) -> None:
        """Bring z up to date with θ."""
        found = self._found(parameters)
        dtype = self.stack.block.eigenvalues.dtype
        # What the parameters' dtype rounded off is no move.
        changes = {
            key: found[key].to(dtype) - at.to(found[key].dtype).to(dtype)
            for key, at in self._at.items()
        }
        rotated = self.rotate(changes)
        self.coordinates = {key: z + rotated[key] for key, z in self.coordinates.items()}
        self._at = {key: tensor.clone() for key, tensor in found.items()}

    def lead(self, parameters: ByName, coordinates: ByName) -> None:
        """Set z, and move θ to match it."""
        self.restore(coordinates)
        for key, target in self._found(parameters).items():
            target.copy_(self._at[key])

    def restore(self, coordinates: ByName) -> None:
        """Set z alone; it is used unchanged if θ turns out to match it."""
        block = self.stack.block
        self.coordinates = dict(coordinates)
        moved = block.unrotate(block.gather(self.coordinates), shapes_of(self._at))
        self._at = {key: anchor[0] + moved[key] for key, _, anchor in self.stack.members}

    def rotate(self, tensors: ByName) -> dict[str, Tensor]:
        """Return parameter-shaped tensors by the stack's own names in the eigenbasis."""
        return self.split(self.stack.block.rotate(tensors))

    def split(self, matrix: Tensor) -> dict[str, Tensor]:
        """Return a matrix of the block by the stack's own names."""
        return self.stack.block.split(matrix, shapes_of(self._at))

    def _found(self, parameters: ByName) -> dict[str, Tensor]:
        return {
            key: protected_slice(name, parameters, anchor[0]).detach()
            for key, name, anchor in self.stack.members
        }


def without_rounding_errors_(rotated: Tensor) -> Tensor:
    """Put zeros where a rotated matrix has nothing but rounding errors, in place.

    Rotation leaves a tiny number where a gradient is exactly zero along a direction, and optimizers
    such as Adam make full steps of it. The error of an entry is a few units in the last place of
    the norm of its row or column; where both norms are within rounding errors of the whole
    matrix, the entry holds no information.

    Args:
        rotated: `[groups, d_out, d_in]`.

    Returns:
        The same matrix.
    """
    squares = rotated.square()
    rows, columns = squares.sum(-1, keepdim=True), squares.sum(-2, keepdim=True)
    known = (_UNITS * torch.finfo(rotated.dtype).eps) ** 2
    unknown = known * rows.sum(-2, keepdim=True)
    nothing = squares < torch.maximum(known * rows, known * columns)
    few_rows, few_columns = rows < unknown, columns < unknown
    # Elsewhere it would have to be waited for, which costs more than what it may save.
    if not rotated.is_cpu or (bool(few_rows.any()) and bool(few_columns.any())):
        nothing |= few_rows & few_columns
    return rotated.masked_fill_(nothing, 0.0)


# In float32, with bases of up to 784 columns, errors of one half were the rule.
_UNITS: Final = 8.0
