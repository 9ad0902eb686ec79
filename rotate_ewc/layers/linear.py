"""Linear maps: `linear` with any number of leading axes, and `addmm`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from einops import rearrange
from torch import Tensor

from rotate_ewc.layers.base import FactoredCall, Factors, Form, IsParameter


@dataclass(frozen=True)
class LinearCall(FactoredCall):
    """`input @ weight.mT + bias`: every axis but the batch axis and the last is shared."""

    @property
    def batch_axes(self) -> tuple[int, ...]:
        """The first axis, or the second (time-first sequences)."""
        return tuple(range(min(self.input.ndim - 1, 2)))

    @property
    def mergeable_axes(self) -> int:
        """All but the last."""
        return self.input.ndim - 1

    def activations(self, inputs: Tensor) -> Tensor:
        """Lay out the input as `[1, n, shared, d_in]`."""
        return rearrange(inputs, "n ... d -> 1 n (...) d")

    def gradients(self, output_gradients: Tensor) -> Tensor:
        """Lay out the output's gradient as `[1, n, shared, d_out]`."""
        return rearrange(output_gradients, "n ... d -> 1 n (...) d")


@dataclass(frozen=True)
class MatmulCall(LinearCall):
    """`input @ weight + bias`."""

    weight_form: ClassVar[Form] = Form(
        Factors.OUTER_PRODUCTS, transposed=True, activation_basis=True
    )


def linear(_: IsParameter, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> LinearCall:
    """Read the arguments of `torch.nn.functional.linear`."""
    return LinearCall(input, weight, bias)


def addmm(
    is_parameter: IsParameter,
    input: Tensor,
    mat1: Tensor,
    mat2: Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
) -> MatmulCall | None:
    """Read the arguments of `torch.addmm`, where `input` is a bias and `mat2` a weight."""
    if is_parameter(mat1) or input.ndim != 1 or (alpha, beta) != (1, 1):
        return None
    return MatmulCall(mat1, mat2, input)
