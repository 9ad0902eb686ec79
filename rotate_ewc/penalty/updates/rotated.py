"""The optimizer steps in the eigenbasis, and the exact proximal step follows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from rotate_ewc._utils.messages import parameters_are
from rotate_ewc.io.snapshot import checked_tensor
from rotate_ewc.penalty.consolidated import ConsolidatedTasks
from rotate_ewc.penalty.displacement import Displacement, without_rounding_errors_
from rotate_ewc.penalty.plasticity import Progress
from rotate_ewc.penalty.step_rules import Quotient, StepRule, StepSize, divided
from rotate_ewc.penalty.terms import Stack
from rotate_ewc.penalty.updates.displaced import DisplacedUpdate
from rotate_ewc.penalty.updates.step import Step, check_gradients, mark_basis, rotated_gradient

# By how much a step has moved each stack, and its η Λ; and what they are in the state of a handle.
_Done = dict[Stack, tuple[Tensor, Tensor]]
_OF_A_LOOK: Final = ("moved", "stiffness")


class RotatedUpdate(DisplacedUpdate):
    """Rotate parameters and gradients for the optimizer; after its step, shrink and rotate back.

    In the coordinates `z = Qᵀ(θ - θ*)` the penalty is ½ λ Σ Λ z². The optimizer goes from z to z',
    with a step size η of its own for every coordinate, and the proximal step after it is

        z ← argmin ½ Σ (z'' - z')² / η + ½ λ Σ Λ z''²  =  z' / (1 + η λ Λ),    θ = θ* + Q z

    It comes to rest exactly where the gradients of loss and penalty cancel, it is stable for every
    λ, and no coordinate is held back by the stiffness of another. The gradients are rotated (two
    products for each block) and z is rotated back (two more), while z itself is kept.

    What the optimizer sees is z, of which small changes are known better than of Qᵀθ. It sees
    `Qᵀθ = z + Qᵀθ*` where it looks at the parameters for more than where they are: weight decay
    is towards zero, not towards θ*.
    """

    def __init__(self, penalty: ConsolidatedTasks, rule: StepRule) -> None:
        """Keep the rule for the size of the optimizer's steps."""
        super().__init__(penalty, rule)
        self._anchors: dict[Stack, Mapping[str, Tensor]] = {}
        self._moving: list[Displacement] = []
        self._rotated: set[str] = set()
        self._looks = False
        # What a step that is looked at has done, until the next gradient tells its progress.
        self._done: _Done | None = None
        self._known_done: _Done | None = None

    def begin(self) -> None:
        """Begin in the eigenbases that the penalty has now."""
        super().begin()
        self._anchors, self._done = {}, None

    def before(self, step: Step) -> None:
        """Put what the optimizer is to step into the eigenbasis."""
        moving = self.moving(step)
        _check_dtypes([d.stack for d in moving], step)
        rotated = [rotated_gradient(d.stack, step, without_rounding_errors_) for d in moving]
        check_gradients([d.stack for d in moving], rotated)
        self.follow(moving, step)
        self._judge({d.stack: r for d, r in zip(moving, rotated, strict=True)}, step)
        self._looks = self.looks()
        own = {}
        for displacement, matrix in zip(moving, rotated, strict=True):
            gradients = displacement.split(matrix)
            seen = self._seen(displacement, step)
            for key, name, anchor in displacement.stack.members:
                parameter, inner = step.parameters[name], tuple(map(slice, anchor.shape[1:]))
                own[name] = {
                    "gradient": _replaced(step.gradients[name], inner, gradients[key], parameter),
                    "data": _replaced(parameter.detach(), inner, seen[key], parameter),
                }
        self._rotated = self.give(step, own)
        for name in step.groups:
            tasks = self.penalty.num_tasks if name in self._rotated else 0
            self.stand_ins.restart(step.optimizer, step.held(name), tasks)
        self._moving = moving

    def after(self, step: Step) -> None:
        """Take the proximal step, and bring the parameters back from the eigenbasis."""
        # First, so that no interrupt leaves averages in an eigenbasis without the note.
        for name in self._rotated:
            mark_basis(step.state(name), self.penalty.num_tasks)
        step = step.sized(self.rule)
        if self._looks:
            self._look(step)
        moved = [self._shrunk(displacement, step) for displacement in self._moving]
        whole = {n: step.parameters[n].data for d in self._moving for n in d.stack.names}
        self.stand_ins.take_back()
        for displacement, coordinates in zip(self._moving, moved, strict=True):
            for _, name, anchor in displacement.stack.members:
                if anchor.shape[1:] != whole[name].shape:
                    step.parameters[name].copy_(whole[name])  # the new rows, for the others follow
            displacement.lead(step.parameters, coordinates)
        self._moving = []

    def remember(self) -> None:
        """Remember what `undo` restores, before a step."""
        super().remember()
        self._known_done = self._done

    def undo(self) -> None:
        """Give model and optimizer back what they had before a step that failed."""
        super().undo()
        self._moving, self._looks = [], False
        self._done = self._known_done

    def state_dict(self) -> dict[str, Any]:
        """Return the coordinates, and what a step has done that is being looked at."""
        state = super().state_dict()
        if self._done is not None and self._stacks is self.penalty.stacks:
            for stack, tensors in self._done.items():
                for name, tensor in zip(_OF_A_LOOK, tensors, strict=True):
                    state[f"{name}/{stack.block.label}"] = tensor
            state["looks"] = True  # in processes that keep no block as well
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        left, done = dict(state), {}
        looks = bool(left.pop("looks", False))
        for stack in self.penalty.stacks if looks else ():
            if f"{_OF_A_LOOK[0]}/{stack.block.label}" in left:
                like = stack.block.spectrum
                moved, stiffnesses = (
                    checked_tensor(place, left.pop(place, None), like.shape, [like.dtype])
                    for place in (f"{name}/{stack.block.label}" for name in _OF_A_LOOK)
                )
                done[stack] = moved.to(like.device), stiffnesses.to(like.device)
        super().load_state_dict(left)
        self._done = done if looks else None

    def _look(self, step: Step) -> None:
        """Find the strength in what the optimizer has just done, before the proximal step."""
        self._looks = False
        seen, done = [], {}
        for displacement in self._moving:
            stack = displacement.stack
            moved, sizes = self._movement(displacement, step)
            stiffnesses = sizes * stack.block.spectrum * self.penalty.scale_of_one
            gains = (moved.square() / sizes).nan_to_num(0.0, 0.0)
            seen.append(Progress(gains, stiffnesses, stack.block.spectrum))
            done[stack] = moved, stiffnesses
        self._done = done if self.finds_strength else None
        self.find_strength(seen, step)

    def _judge(self, gradients: Mapping[Stack, Tensor], step: Step) -> None:
        """Limit the strength, if a step was looked at, by the first gradients after it."""
        if not self.finds_strength:
            self._done = None
        if self._done is None:
            return
        progress = []
        for stack, (moved, stiffnesses) in self._done.items():
            if stack in gradients:
                gains = -moved * gradients[stack] / step.factor(stack.names[0])
                progress.append(Progress(gains, stiffnesses, stack.block.spectrum))
        if self.limit_strength(progress):
            self._done = None

    def _seen(self, displacement: Displacement, step: Step) -> dict[str, Tensor]:
        """Return what the optimizer is to see in place of the parameters: z, or Qᵀθ."""
        coordinates = displacement.coordinates
        anchors = self._shift(displacement, step)
        if anchors is None:
            return {key: z.clone() for key, z in coordinates.items()}
        return {key: z + anchors[key] for key, z in coordinates.items()}

    def _shift(self, displacement: Displacement, step: Step) -> Mapping[str, Tensor] | None:
        """Return Qᵀθ*, or None where the optimizer need not see it."""
        group = step.groups[displacement.stack.names[0]]
        if self.rule.decays_only and not group.get("weight_decay", 0):
            return None
        stack = displacement.stack
        if stack not in self._anchors:
            anchors = {key: anchor[0] for key, _, anchor in stack.members}
            self._anchors[stack] = displacement.rotate(anchors)
        return self._anchors[stack]

    def _movement(self, displacement: Displacement, step: Step) -> tuple[Tensor, Tensor]:
        """Return how far the optimizer has moved a block, and its step sizes η there."""
        seen, block = self._seen(displacement, step), displacement.stack.block
        moves, sizes = {}, {}
        for key, name, anchor in displacement.stack.members:
            inner = tuple(map(slice, anchor.shape[1:]))
            moves[key] = step.parameters[name].detach()[inner] - seen[key]
            size = step.size(name, self.rule)
            sizes[key] = _sliced(size, moves[key], inner).expand_as(moves[key])
        return block.gather(moves), block.gather(sizes)

    def _shrinkage(
        self, displacement: Displacement, key: str, name: str, step: Step, rows: Tensor | None
    ) -> Tensor:
        """Return 1 + η λ Λ of a parameter, or of some of its rows, if possible in one pass over Λ.

        Args:
            displacement: That of its stack.
            key: The stack's own name for it.
            name: Its name.
            step: The step.
            rows: Which rows; None is all.
        """
        spectrum, anchor = displacement.stack.block.spectrum, displacement.coordinates[key]
        inner = tuple(map(slice, anchor.shape))
        if rows is None:
            size = step.size(name, self.rule)
        else:
            like = step.parameters[name].shape
            state = {n: _rows_of(value, rows, like) for n, value in step.state(name).items()}
            size, inner = self.rule.quotient(step.groups[name], state), (slice(None),)
        factor = min(self.penalty.scale, torch.finfo(spectrum.dtype).max)
        if isinstance(size, Quotient) and isinstance(size.rate, float):
            eigenvalues = _rows_of(displacement.split(spectrum)[key], rows, anchor.shape)
            ratio = min(size.rate * factor, torch.finfo(spectrum.dtype).max)
            scale = size.scale[inner]
            return torch.addcdiv(spectrum.new_ones(()), eigenvalues, scale, value=ratio)
        whole = displacement.split(self.stiffness(displacement.stack))[key]
        stiffness: Tensor = _rows_of(whole, rows, anchor.shape)
        return (stiffness * _sliced(size, spectrum, inner)).add_(1.0)

    def _shrunk(self, displacement: Displacement, step: Step) -> dict[str, Tensor]:
        """Return the coordinates after the optimizer's step and the proximal one."""
        shifted = self._shift(displacement, step) is not None
        seen = self._seen(displacement, step) if shifted else {}
        shrunk = {}
        for key, name, anchor in displacement.stack.members:
            inner = tuple(map(slice, anchor.shape[1:]))
            moved = step.parameters[name].detach()[inner]
            if shifted:
                # Where nothing moved, z is to be the same to the bit.
                moved = displacement.coordinates[key] + (moved - seen[key])
            elif name in step.sharded:
                moved = moved.clone()  # the whole parameter is to be written into where it is
            rows, whole = None, step.parameters[name]
            if self.rule.decays_only and name not in step.sharded:  # rules of users want all rows
                rows = _moving_rows(displacement.stack, moved, whole)
            shrinkage = self._shrinkage(displacement, key, name, step, rows)
            # What the optimizer made is nobody else's, so that it can be divided in place.
            if rows is None:
                shrunk[key] = moved.div_(shrinkage)
            else:
                shrunk[key] = moved.index_copy_(0, rows, moved.index_select(0, rows) / shrinkage)
        return shrunk


def _sliced(size: StepSize | Quotient, like: Tensor, inner: tuple[slice, ...]) -> Tensor:
    """Return η for a slice of a parameter, in the dtype of a tensor if it is one number."""
    size = divided(size)
    if not isinstance(size, Tensor):
        return like.new_tensor(size)
    return size[inner] if size.ndim else size


def _moving_rows(stack: Stack, moved: Tensor, parameter: Tensor) -> Tensor | None:
    """Return which rows of a large vocabulary are not at their anchor; None if it is not one.

    The others stay where they are, however strong the penalty is: words that the new task has not.
    """
    is_table = stack.block.transposed and moved.ndim > 1
    if not is_table or stack.block.rotated_inputs is None or moved.shape != parameter.shape:
        return None
    moving = moved.flatten(1).any(dim=1).nonzero().flatten()
    return moving if 2 * len(moving) <= len(moved) else None


def _rows_of(value: Any, rows: Tensor | None, shape: Sequence[int]) -> Any:
    """Return some rows of a tensor of a shape, and all else as it is."""
    if rows is None or not isinstance(value, Tensor) or value.shape != shape:
        return value
    return value.index_select(0, rows)


def _replaced(whole: Tensor, inner: tuple[slice, ...], part: Tensor, parameter: Tensor) -> Tensor:
    """Return a copy of a tensor in which a leading slice is another.

    Args:
        whole: The tensor.
        inner: The slice.
        part: What is to be there; nobody else's, since it may be returned itself.
        parameter: Whose strides it is to have, which fused optimizers take all tensors to have.
    """
    if part.shape == parameter.shape and part.stride() == parameter.stride():
        return part
    copy = torch.empty_like(parameter)
    if part.shape != whole.shape:
        copy.copy_(whole)
    copy[inner] = part
    return copy


def _check_dtypes(stacks: Sequence[Stack], step: Step) -> None:
    """Raise unless the parameters have the dtype of the penalty, in which they will be stepped."""
    found: dict[tuple[torch.dtype, torch.dtype], list[str]] = {}
    for stack in stacks:
        for name in stack.names:
            dtype = step.parameters[name].dtype
            if dtype != stack.block.eigenvalues.dtype:
                found.setdefault((dtype, stack.block.eigenvalues.dtype), []).append(name)
    for (dtype, expected), names in found.items():
        if dtype in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"{parameters_are(names)} {dtype}, in which small steps are lost; expected "
                f"{expected} (with torch.autocast for speed), or update='gradient'"
            )
        raise ValueError(
            f"{parameters_are(names)} {dtype}, but the penalty is {expected}; call "
            f"penalty.to({dtype})"
        )
