"""The proximal step: an implicit step on the penalty, elementwise in its eigenbasis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

import torch
from torch import Tensor

from rotate_ewc._utils.messages import quoted
from rotate_ewc._utils.parameters import fits, protected_slice
from rotate_ewc._utils.validation import as_non_negative_number
from rotate_ewc.linalg.block import shapes_of
from rotate_ewc.penalty.terms import Stack

StepSize = float | Mapping[str, float]


def shrink_towards_anchors_(
    stacks: Sequence[Stack],
    parameters: Mapping[str, Tensor],
    deltas: Mapping[str, Tensor],
    step_size: StepSize,
    scale: float,
) -> None:
    """Divide `θ - θ*` by `1 + η · scale · Λ` in the eigenbasis, in place.

    Args:
        stacks: Stacks of one term each.
        parameters: θ by name; changed in place, as far as they are protected.
        deltas: `θ - θ*` by the stacks' own names, `[1, *shape]`.
        step_size: η, or one for each parameter by name (a joint block takes the mean of two).
        scale: What the eigenvalues are multiplied with.
    """
    shapes = shapes_of(deltas)
    for stack, size in step_sizes_by_stack(step_size, stacks).items():
        block = stack.block
        rotated = block.rotate(deltas)
        # Finite, because infinity times an eigenvalue of zero would not be a number.
        factor = min(size * scale, torch.finfo(rotated.dtype).max)
        shrunk = rotated / (1.0 + factor * block.eigenvalues)
        moved = block.unrotate(shrunk, shapes)
        for key, name, anchor in stack.members:
            if fits(name, parameters, anchor[0]):
                protected_slice(name, parameters, anchor[0]).copy_(anchor[0] + moved[key][0])


def check_step_size(step_size: StepSize) -> None:
    """Raise unless all step sizes are finite numbers of at least 0."""
    if isinstance(step_size, Mapping):
        for name, size in step_size.items():
            as_non_negative_number(f"step_size[{name!r}]", size)
    else:
        as_non_negative_number("step_size", step_size)


def step_sizes_by_stack(step_size: StepSize, stacks: Sequence[Stack]) -> dict[Stack, float]:
    """Return the step size of every stack, the mean where its parameters have several.

    Raises:
        ValueError: If parameters have none, naming them.
    """
    if not isinstance(step_size, Mapping):
        return dict.fromkeys(stacks, float(step_size))
    names = dict.fromkeys(name for stack in stacks for name in stack.names)
    if without := [name for name in names if name not in step_size]:
        raise ValueError(
            f"step_size has no entry for the parameter {quoted(without)}; expected one for each"
        )
    return {stack: fmean(float(step_size[name]) for name in stack.names) for stack in stacks}
