"""Per-example gradients of whatever a model does with its parameters, one example at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from rotate_ewc._utils.numerics import statistics_dtype
from rotate_ewc._utils.tree import map_tensors, tensors_in
from rotate_ewc.tracing.forward_pass import back_propagate


def squares_like(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Make room for squared gradients, in float32 or better."""
    return {name: _zeros(parameter) for name, parameter in parameters.items()}


def add_squares(
    squares: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor],
    forward: Callable[[Any], Tensor],
    inputs: Any,
    outputs: Tensor,
    num_examples: int,
    vector: Tensor,
    *,
    in_batch: bool,
) -> None:
    """Back-propagate one output vector for every example by itself, and add the squared gradients.

    Args:
        squares: The sums so far, by parameter name.
        parameters: The parameters, by name.
        forward: From inputs to the model's outputs.
        inputs: The batch's inputs.
        outputs: The model's outputs for the batch, attached to the autograd graph.
        num_examples: Number of examples in the batch.
        vector: Of the outputs' shape.
        in_batch: Whether examples stay in their batch: the rows of inputs may be something else.
    """
    cut = not in_batch and _can_be_cut(inputs, num_examples)
    of_examples = _by_example(forward, inputs, outputs, vector, num_examples, cut=cut)
    for own_outputs, part in of_examples:
        gradients = back_propagate(own_outputs, list(parameters.values()), part, retain_graph=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is None:
                continue
            dense = gradient.to_dense() if gradient.is_sparse else gradient
            squares[name].add_(dense.to(squares[name].dtype).square())


def _zeros(parameter: Tensor) -> Tensor:
    dtype = statistics_dtype(parameter.dtype)
    return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)


def same_outputs(one: Tensor, other: Tensor) -> bool:
    """Whether a model's outputs are the same, up to rounding."""
    one, other = one.detach(), other.detach()
    tolerance = min(1e-1, 1e3 * torch.finfo(other.dtype).eps)
    scale = max(1e-30, float(other.abs().max()))
    if one.shape != other.shape:
        return False
    return float((one - other).abs().max()) <= tolerance * scale


def _by_example(
    forward: Callable[[Any], Tensor],
    inputs: Any,
    outputs: Tensor,
    vector: Tensor,
    num_examples: int,
    *,
    cut: bool,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield, for every example, outputs and the vector by which its gradient comes from them.

    Where the inputs can be cut into examples, the model is run again on the example by itself,
    which is far less work than the whole batch; else the example's part of the batch's outputs is
    taken.
    """
    rows = len(vector) // num_examples
    for example in range(num_examples):
        own = slice(example * rows, (example + 1) * rows)
        if cut:
            own_outputs = _run_alone(forward, inputs, example)
            if own_outputs is not None and same_outputs(own_outputs, outputs[own]):
                yield own_outputs, vector[own]
                continue
            if isinstance(inputs, Tensor):
                raise ValueError(
                    f"the outputs of example {example} are not the same when it is run alone: "
                    f"the outputs of one example depend on other examples, or the model is random; "
                    f"expected independent examples and a deterministic model"
                )
        of_example = torch.zeros_like(vector)
        of_example[own] = vector[own]
        yield outputs, of_example


def _can_be_cut(inputs: Any, num_examples: int) -> bool:
    tensors = list(tensors_in(inputs))
    return bool(tensors) and all(
        t.layout is torch.strided and t.ndim and len(t) == num_examples for t in tensors
    )


def _run_alone(forward: Callable[[Any], Tensor], inputs: Any, example: int) -> Tensor | None:
    """Return the outputs of an example by itself; None where a model does not take it."""
    try:
        with torch.enable_grad():
            return forward(map_tensors(lambda tensor: tensor[example : example + 1], inputs))
    except (IndexError, RuntimeError, ValueError):
        # It may have as many rows of something else as there are examples, with indices to them.
        return None
