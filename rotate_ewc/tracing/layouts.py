"""Find where the examples of a batch are: measured once for a program, or for every batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, Final

import torch
from torch import Generator, Tensor

from rotate_ewc._utils.tree import tensors_in
from rotate_ewc.tracing.example_rows import Layout, of_one_example
from rotate_ewc.tracing.forward_pass import ForwardPass
from rotate_ewc.tracing.row_owners import find_example_rows, random_vector, signatures

# How many programs are remembered; a model that never does the same twice has one for each batch.
_REMEMBERED: Final = 1000
FoundLayout = tuple[Layout, Iterator[Tensor], list[Tensor] | None]
"""The examples' rows; the batch's output vectors; and the gradients of the first, if known."""


@dataclass
class Layouts:
    """Finds the examples' rows of one batch after another.

    Two batches for which the model calls the same functions have the same rows: they are measured
    with a random output vector, and then remembered. Not so where the data tell where rows go.
    There every batch is measured, with the output vectors that it has in any case, by one backward
    pass more; and by two more if one of its later vectors reaches rows that the first did not.

    Attributes:
        seed: For the random vector.
        remembered: The rows by program, number of examples and names of the uses; None where they
            were not certain.
    """

    seed: int
    remembered: dict[tuple[object, ...], Layout | None] = field(default_factory=dict)

    def find(
        self,
        recorded: ForwardPass,
        inputs: Any,
        num_examples: int,
        vectors: Iterator[Tensor],
        *,
        one_vector: bool,
        free_graph: bool,
        may_remember: bool = True,
    ) -> FoundLayout:
        """Find the examples' rows in a batch.

        Args:
            recorded: The forward pass.
            inputs: The batch's inputs.
            num_examples: Number of examples in the batch.
            vectors: The batch's output vectors.
            one_vector: Whether there is only one of them.
            free_graph: Whether these are all that will be back-propagated.
            may_remember: Whether batches with the same program have the same rows; not so if the
                program takes tensors for constants that may be data.

        Returns:
            The rows, the output vectors, and the gradients of the first of them if they were taken.
        """
        if num_examples == 1 or not recorded.uses:
            return of_one_example(recorded.uses), vectors, None
        program = (recorded.program.key, num_examples, *(use.name for use in recorded.uses))
        layout = self.remembered.get(program) if may_remember else None
        if layout is not None:
            return layout, vectors, None
        moving = recorded.program.indexes_by_data(num_examples)
        by_data = moving or not may_remember or not _aligned(inputs, num_examples)
        if not by_data and program not in self.remembered:
            if len(self.remembered) >= _REMEMBERED:
                self.remembered.clear()
            layout = self.measure(recorded, num_examples)
            self.remembered[program] = layout if layout.certain else None
            return layout, vectors, None
        first = next(vectors)
        gradients = recorded.gradients(first, last=False)
        layout = find_example_rows(
            recorded,
            num_examples,
            first.clone(memory_format=torch.contiguous_format),
            signatures(recorded.uses, gradients),
            free_graph=one_vector and free_graph,
        )
        return layout, chain([first], vectors), gradients

    def measure(self, recorded: ForwardPass, num_examples: int) -> Layout:
        """Measure the examples' rows, by two backward passes, for all output vectors at once."""
        outputs = recorded.outputs.detach()
        vector = random_vector(outputs, Generator(outputs.device).manual_seed(self.seed))
        # Not kept, or two sets of gradients would live at once.
        before = signatures(recorded.uses, recorded.gradients(vector, last=False))
        return replace(find_example_rows(recorded, num_examples, vector, before), unseen=())


def _aligned(inputs: Any, num_examples: int) -> bool:
    """Whether all tensors hold the examples on the same axis, the first or (time first) the second.

    Matrices of data by which a model multiplies may move rows, such as those of graphs.
    """
    tensors = list(tensors_in(inputs))
    if any(t.is_nested or t.layout != torch.strided for t in tensors):
        return False
    many = [tensor for tensor in tensors if tensor.numel() > 1]
    return any(
        all(t.ndim > axis and t.shape[axis] == num_examples for t in many) for axis in (0, 1)
    )
