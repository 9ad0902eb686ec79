"""Find the axis of a layer's tensors that holds the examples, by experiment, and prove it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Generator, Tensor

from rotate_ewc._utils.numerics import statistics_dtype
from rotate_ewc.errors import NotFiniteError
from rotate_ewc.tracing.recorder import ForwardPass, Use


@dataclass(frozen=True)
class ExampleAxis:
    """The axis that holds the examples, each of which may own several rows of it.

    Attributes:
        axis: The axis; it reads `(runs, examples, rows)`.
        runs: In how many runs of consecutive rows an example's lie: one; or as many as it has rows,
            where the rows are ordered by time first (as inside `MultiheadAttention`); or a number
            between (the same, with several windows of each example).
    """

    axis: int
    runs: int = 1

    def examples_first(self, tensor: Tensor, num_examples: int) -> Tensor:
        """Return a view `[num_examples, rows, *rest]` of a tensor."""
        moved = tensor.movedim(self.axis, 0)
        return rearrange(moved, "(r n t) ... -> n (r t) ...", n=num_examples, r=self.runs)


def find_example_axes(
    recorded: ForwardPass, num_examples: int, generator: Generator
) -> tuple[list[ExampleAxis], bool]:
    """Find the axis of the examples in every use, and prove that they are independent.

    One example's outputs are back-propagated: in a layer whose example axis is right, and which
    does not mix examples, only that example's rows can receive a gradient. Two examples are tried,
    the first and the last, because a model that reads only one position of a sequence can make a
    wrong axis look right for one of them. Where a layer's shape leaves a choice and an example's
    gradient vanishes, which proves nothing, others are tried in its place.

    Wherever several candidates pass, more examples are tried, but no more than five.

    Args:
        recorded: The forward pass.
        num_examples: Number of examples in the batch.
        generator: Where the random combinations of outputs come from.

    Returns:
        The axis for every use, and whether it holds for all batches of these shapes.

    Raises:
        ValueError: If no candidate passes, naming the layer.
    """
    fitting = [_fitting(use, num_examples) for use in recorded.uses]
    undecided = [index for index, candidates in enumerate(fitting) if len(candidates) > 1]
    evidence = dict.fromkeys(undecided, 0)
    examples = dict.fromkeys([0, num_examples - 1, *range(1, num_examples - 1)])
    for tried, example in enumerate(examples):
        enough = {index: 2 if len(fitting[index]) == 1 else 5 for index in undecided}
        if tried >= 2 and all(evidence[index] >= enough[index] for index in undecided):
            break
        gradients = _probe(recorded, example, num_examples, generator)
        for index, (use, gradient) in enumerate(zip(recorded.uses, gradients, strict=True)):
            fitting[index] = _passing(use, gradient, fitting[index], example, num_examples)
        for index in undecided:
            evidence[index] += int(bool(gradients[index].count_nonzero()))
        # Or two sets of gradients would live at once.
        del gradients, gradient
    # What passes is right for this batch, but only the last one left is for others too.
    certain = all(evidence[i] >= 2 and len(fitting[i]) == 1 for i in undecided)
    return [candidates[0] for candidates in fitting], certain


def _fitting(use: Use, num_examples: int) -> list[ExampleAxis]:
    """Return the candidates that the shape of a use's input allows."""
    shape = use.call.input.shape
    candidates = []
    for axis in use.call.batch_axes:
        rows, left_over = divmod(shape[axis], num_examples)
        if not left_over:
            possible = (runs for runs in range(2, rows) if rows % runs == 0)
            several = num_examples > 1 and rows > 1
            runs_to_try = (1, *([rows, *possible] if several else []))
            candidates += [ExampleAxis(axis, runs) for runs in runs_to_try]
    if not candidates:
        raise ValueError(
            f"the layer of {use.name!r} got an input of shape {list(shape)}, in which no axis can "
            f"hold the batch's {num_examples} examples; expected them on the first axis (if the "
            f"inputs' first axis is not the number of examples, pass batch_size_fn)"
        )
    return candidates


def _probe(
    recorded: ForwardPass, example: int, num_examples: int, generator: Generator
) -> list[Tensor]:
    """Return the gradients at every use of a random combination of one example's outputs."""
    outputs = recorded.outputs.detach()
    rows = outputs.shape[0] // num_examples
    vector = torch.zeros_like(outputs)
    part = vector[example * rows : (example + 1) * rows]
    part.copy_(torch.randn(part.shape, generator=generator, device=part.device))
    return recorded.gradients(vector, last=False)


def _passing(
    use: Use, gradient: Tensor, candidates: Sequence[ExampleAxis], example: int, num_examples: int
) -> list[ExampleAxis]:
    """Return the candidates by which one example's gradient is in its own rows alone."""
    # Their sum may be too large for half precision where each of them is not.
    if not bool(torch.isfinite(gradient.sum(dtype=statistics_dtype(gradient.dtype)))):
        raise NotFiniteError(
            f"the output gradients of {use.name!r} are not finite (NaN or infinity)"
        )
    everywhere = int(gradient.count_nonzero())
    passing = [
        candidate
        for candidate in candidates
        if int(candidate.examples_first(gradient, num_examples)[example].count_nonzero())
        == everywhere
    ]
    if not passing:
        raise ValueError(
            f"the outputs of one example depend on other examples' values in the layer of "
            f"{use.name!r} (input shape {list(use.call.input.shape)}); expected independent "
            f"examples: use BatchNorm in eval mode with running statistics, and keep the examples "
            f"on the first axis"
        )
    return passing
