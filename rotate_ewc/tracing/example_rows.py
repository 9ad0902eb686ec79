"""What an example's rows of a layer's tensors are: on an axis, evenly spaced, or anywhere."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from einops import rearrange
from torch import Tensor

from rotate_ewc.tracing.recorder import Use


class ExampleRows(Protocol):
    """Which rows of a use's input and output belong to which example."""

    @property
    def present(self) -> Tensor | None:
        """Which of the rows `[num_examples, rows]` exist; None if all do."""

    def examples_first(self, tensor: Tensor, num_examples: int) -> Tensor:
        """Return a tensor as `[num_examples, rows, *rest]`; anything where a row does not exist."""

    def gradients_first(self, gradients: Tensor, num_examples: int) -> Tensor:
        """Return gradients as `[num_examples, rows, *rest]`; zeros where a row does not exist."""

    def size_of(self, shape: Sequence[int]) -> int:
        """Return how many numbers a tensor of some shape has with the examples first."""


@dataclass(frozen=True)
class ExampleAxis:
    """An axis that holds the examples, each of which owns as many rows of it as every other.

    Attributes:
        axis: The axis; it reads `(runs, examples, rows)`.
        runs: In how many runs of consecutive rows an example's lie: one; or as many as it has rows,
            where the rows are ordered by time first (as inside `MultiheadAttention`); or a number
            between (the same, with several windows of each example).
    """

    axis: int
    runs: int = 1

    @property
    def present(self) -> None:
        """All rows exist."""
        return

    def examples_first(self, tensor: Tensor, num_examples: int) -> Tensor:
        """Return a view `[num_examples, rows, *rest]` of a tensor."""
        moved = tensor.movedim(self.axis, 0)
        return rearrange(moved, "(r n t) ... -> n (r t) ...", n=num_examples, r=self.runs)

    def gradients_first(self, gradients: Tensor, num_examples: int) -> Tensor:
        """Return a view likewise."""
        return self.examples_first(gradients, num_examples)

    def size_of(self, shape: Sequence[int]) -> int:
        """Return how many numbers a tensor of some shape has."""
        return math.prod(shape)

    def owners(self, leading: Sequence[int], num_examples: int) -> Tensor:
        """Return the example of every cell of the leading axes, `[*leading]`."""
        size = leading[self.axis]
        examples = torch.arange(num_examples)[None, :, None]
        examples = examples.expand(self.runs, -1, size // (self.runs * num_examples))
        view = [1] * len(leading)
        view[self.axis] = size
        return examples.reshape(view).expand(*leading)


@dataclass(frozen=True, eq=False)
class ScatteredRows:
    """Rows of which every example owns some, in any order and number.

    Attributes:
        axis: The axis of the rows, or the first of those that are merged into one.
        merged: How many axes are merged; then `axis` is 0.
        rows: Every example's rows, `[num_examples, most]`; a row of another one where it has less.
        present: Which of them are the example's own.
    """

    axis: int
    merged: int
    rows: Tensor
    present: Tensor

    @classmethod
    def of(cls, axis: int, merged: int, owners: Tensor, num_examples: int) -> ScatteredRows:
        """Sort rows by their owners `[size]`."""
        order = owners.argsort(stable=True)
        counts = owners.bincount(minlength=num_examples)
        starts = counts.cumsum(0) - counts
        places = torch.arange(int(counts.max()), device=owners.device)
        present = places < counts[:, None]
        positions = torch.where(present, starts[:, None] + places, 0)
        return cls(axis, merged, order[positions], present)

    def examples_first(self, tensor: Tensor, num_examples: int) -> Tensor:
        """Return the rows of every example, `[num_examples, most, *rest]`, a copy."""
        del num_examples
        return tensor.movedim(self.axis, 0).flatten(0, self.merged - 1)[self.rows]

    def gradients_first(self, gradients: Tensor, num_examples: int) -> Tensor:
        """Return the gradients of every example's rows, with zeros for those that it lacks."""
        found = self.examples_first(gradients, num_examples)
        return found.mul_(self.present.view(*self.present.shape, *(1,) * (found.ndim - 2)))

    def size_of(self, shape: Sequence[int]) -> int:
        """Return how many numbers a tensor of some shape has when every example has the most."""
        rows = math.prod(shape[self.axis : self.axis + self.merged])
        return math.prod(shape) // max(1, rows) * self.rows.numel()


@dataclass(frozen=True)
class Layout:
    """Where the examples are in all uses of a batch.

    Attributes:
        rows: For every use; None where examples are mixed.
        certain: Whether the rows that got a gradient leave no choice.
        unseen: For every use, which cells of its leading axes got no gradient, where another vector
            may give them one; or else None.
    """

    rows: tuple[ExampleRows | None, ...]
    certain: bool = True
    unseen: tuple[Tensor | None, ...] = ()

    @property
    def is_tentative(self) -> bool:
        """Whether it may not hold for other output vectors."""
        return any(cells is not None for cells in self.unseen)

    def covers(self, gradients: Sequence[Tensor]) -> bool:
        """Whether it holds for the vector of some gradients: none is where none was seen before.

        Args:
            gradients: The gradient at every use, as it comes from the backward pass.
        """
        return not any(
            cells is not None and bool((gradient[cells] != 0).any())
            for cells, gradient in zip(self.unseen, gradients, strict=True)
        )


def of_one_example(uses: Sequence[Use]) -> Layout:
    """Return the layout of a batch that is a single example: all rows are its own."""
    return Layout(tuple(next(even_axes(use, 1), None) for use in uses))


def mixing_message(uses: Sequence[Use], num_examples: int) -> str:
    """Say which layers mix the examples of a batch, and what to do."""
    shapes = {use.name: list(use.call.input.shape) for use in uses}
    layers = ", ".join(f"{name!r} (input shape {shape})" for name, shape in shapes.items())
    if num_examples == 1:
        return (
            f"no axis can hold the examples in the layer of {layers}; leave it out (params, or "
            f"exclude), or pass unsupported='diagonal'"
        )
    return (
        f"the outputs of one example depend on other examples' values in the layer of {layers}, "
        f"for a batch of {num_examples} examples; expected independent examples. Use BatchNorm in "
        f"eval mode with running statistics; pass batch_size_fn if the batch has another number of "
        f"examples; give what is the same for all of them, such as positions, a row for each "
        f"(positions.expand(len(x), -1)); and where examples do depend on each other (a graph, a "
        f"contrastive loss), take a batch for one example: batch_size_fn=lambda inputs: 1, which "
        f"is exact with fisher_type='type2'. Whatever it is, unsupported='diagonal' takes an exact "
        f"diagonal, which is slow"
    )


def even_axes(use: Use, num_examples: int) -> Iterator[ExampleAxis]:
    """Yield the even layouts that the shape of a use's input allows, likely ones first."""
    shape = use.call.input.shape
    for axis in use.call.batch_axes:
        rows, left_over = divmod(shape[axis], num_examples)
        if left_over or (not rows and num_examples > 1):
            continue
        yield ExampleAxis(axis)
        if num_examples > 1 and rows > 1:
            yield ExampleAxis(axis, rows)
            yield from (ExampleAxis(axis, r) for r in range(2, rows) if rows % r == 0)
