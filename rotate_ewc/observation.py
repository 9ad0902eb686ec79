"""What one batch shows of every layer, grouped by the blocks it belongs to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rotate_ewc.capture import Use

# From a tensor, a number of examples and their axis to [groups, examples, shared, features].
Layout = Callable[[Tensor, int, int], Tensor]


@dataclass(frozen=True)
class BlockKey:
    """Which parameters a block is for: a weight, a bias, or both jointly."""

    weight: str | None
    bias: str | None

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names, weight first."""
        return tuple(name for name in (self.weight, self.bias) if name is not None)

    @property
    def label(self) -> str:
        """The names joined for messages."""
        return "+".join(self.parameters)


@dataclass(frozen=True)
class Observation:
    """One batch's layer inputs and the gradients of some of its output vectors.

    Attributes:
        num_examples: Examples in the batch.
        mass: What the batch adds to the normaliser.
        uses: Every use of a parameter.
        batch_axes: The axis of the examples, for every use.
        gradient_sets: For every output vector, the gradient at the output of every use.
        first: Whether this is the batch's first observation; a batch is cut into several when the
            gradients of all its output vectors would not fit in the memory budget.
    """

    num_examples: int
    mass: float
    uses: Sequence[Use]
    batch_axes: Sequence[int]
    gradient_sets: Sequence[Sequence[Tensor]]
    first: bool

    @property
    def num_bytes(self) -> int:
        """Memory that keeping the observation takes."""
        gradients = sum(g.nbytes for gradient_set in self.gradient_sets for g in gradient_set)
        return gradients + sum(use.call.input.nbytes for use in self.uses)

    def by_block(self, separate: bool) -> dict[BlockKey, list[int]]:
        """Group the uses by block.

        Args:
            separate: Whether a weight and its bias are two blocks.
        """
        groups: dict[BlockKey, list[int]] = {}
        for index, use in enumerate(self.uses):
            keys = [BlockKey(use.weight, use.bias)]
            if separate:
                keys = [BlockKey(use.weight, None), BlockKey(None, use.bias)]
            for key in keys:
                if key.parameters:
                    groups.setdefault(key, []).append(index)
        return groups

    def chunks(self, key: BlockKey, indices: Sequence[int], max_bytes: int) -> Iterator[slice]:
        """Cut the examples so that one block's vectors of a chunk stay within `max_bytes`."""
        per_example = 0
        for index in indices:
            call, gradient = self.uses[index].call, self.gradient_sets[0][index]
            d_out = call.weight.shape[0]
            positions = gradient.numel() / d_out
            d_in = call.weight.numel() / d_out * call.groups if key.weight else 0
            per_example += int(positions * (d_in + d_out)) * _statistics_size(gradient)
        per_example = max(1, per_example // self.num_examples)
        size = max(1, max_bytes // per_example)
        for start in range(0, self.num_examples, size):
            yield slice(start, min(start + size, self.num_examples))

    def activations(self, key: BlockKey, indices: Sequence[int], chunk: slice) -> Tensor:
        """Return the block's inputs a, `[groups, chunk, shared, d_in]`, in float32 or better.

        In a joint block the first feature is a one, which stands for the bias.
        """
        calls = [self.uses[index].call for index in indices]
        inputs = self._lay_out(indices, chunk, [(c.input, c.activations) for c in calls])
        if key.bias is None:
            return inputs
        return torch.cat([torch.ones_like(inputs[..., :1]), inputs], dim=3)

    def gradients(self, which: int, indices: Sequence[int], chunk: slice) -> Tensor:
        """Return one vector's gradients g, `[groups, chunk, shared, d_out]`."""
        gradients = self.gradient_sets[which]
        sources = [(gradients[index], self.uses[index].call.gradients) for index in indices]
        return self._lay_out(indices, chunk, sources)

    def _lay_out(
        self, indices: Sequence[int], chunk: slice, sources: Sequence[tuple[Tensor, Layout]]
    ) -> Tensor:
        """Select examples of every use, lay them out, and join the uses on the shared axis."""
        parts = []
        for index, (tensor, layout) in zip(indices, sources, strict=True):
            axis = self.batch_axes[index]
            part = _narrow(tensor, axis, self.num_examples, chunk)
            parts.append(layout(part, chunk.stop - chunk.start, axis))
        return _as_statistics(torch.cat(parts, dim=2) if len(parts) > 1 else parts[0])


def _narrow(tensor: Tensor, axis: int, num_examples: int, chunk: slice) -> Tensor:
    """Select examples along an axis in which each of them may own several consecutive rows."""
    rows = tensor.shape[axis] // num_examples
    return tensor.detach().narrow(axis, chunk.start * rows, (chunk.stop - chunk.start) * rows)


def _as_statistics(tensor: Tensor) -> Tensor:
    """Statistics are accumulated in float32 or better, whatever the model computes in."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _statistics_size(tensor: Tensor) -> int:
    return torch.promote_types(tensor.dtype, torch.float32).itemsize
