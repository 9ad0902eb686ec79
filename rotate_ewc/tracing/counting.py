"""Count the examples of a batch: what its inputs, its targets and the model's outputs agree on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rotate_ewc._utils.tree import map_tensors, tensors_in

_REMEDY = "pass batch_size_fn, a function from a batch's inputs to their number of examples"


@dataclass
class ExampleCounter:
    """Counts the examples of one batch after another.

    It is the size of the inputs' first axis, of which that of the outputs must be a multiple (an
    example may have several rows of outputs, such as tokens). Where inputs have several tensors,
    exactly one of their sizes must be so. Where the outputs have as many rows as the inputs' second
    axis, as with sequences that have time first, an earlier batch or an experiment tells which of
    the two holds the examples: two of them change places, and so must their outputs.

    Attributes:
        forward: From inputs to the model's outputs; None for no experiment.
        batch_size_fn: From inputs to the number of examples, if the user knows better.
        axis: The axis of the inputs that holds the examples, if earlier batches have shown it.
    """

    forward: Callable[[Any], Tensor] | None = None
    batch_size_fn: Callable[[Any], int] | None = None
    axis: int | None = None

    def count(self, inputs: Any, outputs: Tensor, targets: Any) -> int:
        """Return the number of examples in a batch.

        Args:
            inputs: The batch's inputs.
            outputs: The model's outputs.
            targets: The batch's targets; what is no tensor has no part in it.

        Raises:
            TypeError: If the inputs hold no tensors and there is no `batch_size_fn`.
            ValueError: If there are no examples, or inputs, outputs and targets do not agree.
        """
        if self.batch_size_fn is not None:
            return _as_told(self.batch_size_fn(inputs), outputs)
        tensors = self.check(inputs)
        told = targets if isinstance(targets, Tensor) else outputs
        rows, labels = (len(t) if t.ndim else 0 for t in (outputs, told))
        counts = {}
        agreed = _first_axes(tensors, rows, labels)
        if len(agreed) == 1:
            (counts[0],) = agreed
        second = {t.shape[1] if t.ndim > 1 and not t.is_nested else 0 for t in tensors}
        if second == {rows} and labels == rows and agreed != {rows}:
            counts[1] = rows
        axis = self._axis(counts, inputs, outputs) if rows else None
        if axis not in counts:
            shapes = ", ".join(map(_shape, tensors))
            raise ValueError(
                f"the number of examples in a batch is not obvious: its inputs have shape "
                f"{shapes}, the model's outputs {list(outputs.shape)} and the targets "
                f"{list(told.shape)}; {_REMEDY}"
            )
        return counts[axis]

    def check(self, inputs: Any) -> list[Tensor]:
        """Return the tensors whose first axis may hold the examples.

        Raises:
            TypeError: If there are none and no `batch_size_fn`.
            ValueError: If one of them is empty.
        """
        tensors = [tensor for tensor in tensors_in(inputs) if tensor.ndim]
        if self.batch_size_fn is None and not tensors:
            raise TypeError(
                f"the number of examples in inputs of type {type(inputs).__name__} is not obvious; "
                f"{_REMEDY}"
            )
        if self.batch_size_fn is None and any(tensor.size(0) == 0 for tensor in tensors):
            raise ValueError(f"a batch has 0 examples; expected at least 1, or {_REMEDY}")
        return tensors

    def _axis(self, counts: Mapping[int, int], inputs: Any, outputs: Tensor) -> int | None:
        """Return the axis that holds the examples; None if that is not known.

        Args:
            counts: The axes that may, and how many examples there are then.
            inputs: The batch's inputs.
            outputs: The model's outputs.
        """
        if counts.get(0) == len(outputs):
            return 0
        found = [axis for axis in counts if self.axis in (None, axis)]
        if len(found) > 1 and counts[0] == 1:
            # One example rather than one step of several; or else a later batch will contradict.
            found = [0]
        elif len(found) > 1 and self.forward is not None:
            found = [
                axis
                for axis, count in counts.items()
                if _holds_examples(axis, count, inputs, outputs, self.forward)
            ]
        if len(found) != 1:
            return None
        (self.axis,) = found
        return self.axis


def _first_axes(tensors: Sequence[Tensor], rows: int, labels: int) -> set[int]:
    """Return the sizes of first axes that outputs and targets agree with."""
    sizes = {tensor.size(0) for tensor in tensors}
    agreed = {size for size in sizes if rows % size == 0 and labels % size == 0}
    # What has one row, such as positions, may be for all examples; unless those are its columns.
    alone = [tensor for tensor in tensors if tensor.size(0) == 1 and tensor.ndim > 1]
    columns = {tensor.shape[1] for tensor in alone if not tensor.is_nested}
    return agreed if len(agreed) == 1 or agreed & columns else agreed - {1}


def _as_told(count: int, outputs: Tensor) -> int:
    """Return what `batch_size_fn` returned, if it can be."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"batch_size_fn returned {count!r}; expected an integer of at least 1")
    if not outputs.ndim or len(outputs) % count:
        raise ValueError(
            f"the model's outputs have shape {list(outputs.shape)} for {count} examples, as "
            f"batch_size_fn counts them; expected the examples on the first axis (forward= may be "
            f"a function that moves it there)"
        )
    return count


def _holds_examples(
    axis: int, count: int, inputs: Any, outputs: Tensor, forward: Callable[[Any], Tensor]
) -> bool:
    """Whether two examples on an axis of the inputs change places together with their outputs."""
    if count < 2:
        return True
    swapped = torch.arange(count, device=outputs.device)
    swapped[:2] = swapped[:2].flip(0)
    others = map_tensors(
        lambda t: t.index_select(axis, swapped.to(t.device)) if t.ndim > axis else t, inputs
    )
    with torch.no_grad():
        found = forward(others)
    expected = outputs.view(count, -1, *outputs.shape[1:])[swapped].view_as(outputs)
    if found.shape != expected.shape:
        return False
    tolerance = 1e-2 * float((outputs - expected).abs().max())
    return float((found - expected).abs().max()) < tolerance


def _shape(tensor: Tensor) -> str:
    return f"nested, {tensor.size(0)} of them" if tensor.is_nested else str(list(tensor.shape))
