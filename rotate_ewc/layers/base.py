"""What a layer family must tell: how one use of its parameters becomes vectors a and g."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LayerCall(ABC):
    """One use of a layer's parameters, in the canonical layout `[groups, batch, shared, features]`.

    For every example n the gradient of the weight, as a matrix for each group, is
    `G_n = Σ_s g_ns a_nsᵀ`, where s runs over the positions that share the weight.

    Attributes:
        input: The layer's input.
        weight: The weight; `weight.reshape(groups, d_out, d_in)` is the matrix.
        bias: The bias, if any; `bias.reshape(groups, d_out)` goes with it.
    """

    input: Tensor
    weight: Tensor
    bias: Tensor | None

    groups: int = 1

    @property
    @abstractmethod
    def batch_axes(self) -> tuple[int, ...]:
        """Axes of the input that can hold the examples, the most likely one first."""

    @abstractmethod
    def activations(self, layer_input: Tensor, num_examples: int, batch_axis: int) -> Tensor:
        """Turn (a part of) the input into a `[groups, num_examples, shared, d_in]`."""

    @abstractmethod
    def gradients(self, output_gradient: Tensor, num_examples: int, batch_axis: int) -> Tensor:
        """Turn (a part of) the output's gradient into g `[groups, num_examples, shared, d_out]`."""
