"""`torch.nn.functional.linear`, with any number of leading axes."""

from __future__ import annotations

from dataclasses import dataclass

from einops import rearrange
from torch import Tensor

from rotate_ewc.layers.base import LayerCall


@dataclass(frozen=True)
class LinearCall(LayerCall):
    """A linear map: every axis but the batch axis and the last is shared."""

    @property
    def batch_axes(self) -> tuple[int, ...]:
        """The first axis, or the second (time-first sequences)."""
        return tuple(range(min(self.input.ndim - 1, 2)))

    def activations(self, layer_input: Tensor, num_examples: int, batch_axis: int) -> Tensor:
        """Lay out the input as `[1, num_examples, shared, d_in]`."""
        return _by_example(layer_input, num_examples, batch_axis)

    def gradients(self, output_gradient: Tensor, num_examples: int, batch_axis: int) -> Tensor:
        """Lay out the output's gradient as `[1, num_examples, shared, d_out]`."""
        return _by_example(output_gradient, num_examples, batch_axis)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> LinearCall:
    """Read the arguments of `torch.nn.functional.linear`."""
    return LinearCall(input, weight, bias)


def _by_example(tensor: Tensor, num_examples: int, batch_axis: int) -> Tensor:
    """Move the batch axis to the front; an example may own several consecutive rows of it."""
    batch_first = tensor.movedim(batch_axis, 0)
    rows = batch_first.reshape(batch_first.shape[0], -1, tensor.shape[-1])
    return rearrange(rows, "(n t) s d -> 1 n (t s) d", n=num_examples)
