"""Parameters that scale or shift data elementwise, with broadcasting: `x * p`, `x + p`, `x - p`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile
from typing import ClassVar

import torch
from torch import Tensor

from rotate_ewc.layers.base import DIAGONAL, Form, IsParameter, LayerCall


@dataclass(frozen=True)
class ElementwiseCall(LayerCall):
    """`normalize(input) * weight + sign * bias`, where input has the output's shape.

    Attributes:
        view: The shape with which the parameters are broadcast against the input.
        sign: -1 where the bias is subtracted, or any other factor.
        normalize: What a normalization layer does with its input `[n, *rest]` before it scales it;
            done again for few examples at a time, rather than kept for all.
    """

    view: tuple[int, ...] = ()
    sign: float = 1.0
    normalize: Callable[[Tensor], Tensor] | None = None

    weight_form: ClassVar[Form] = DIAGONAL
    bias_form: ClassVar[Form] = DIAGONAL

    @property
    def batch_axes(self) -> tuple[int, ...]:
        """The first or second axis, where the parameters do not vary along it."""
        missing = self.input.ndim - len(self.view)
        return tuple(
            axis
            for axis in range(min(self.input.ndim, 2))
            if axis < missing or self.view[axis - missing] == 1
        )

    @property
    def mergeable_axes(self) -> int:
        """The leading axes along which the parameters do not vary, and nothing is normalized."""
        missing = self.input.ndim - len(self.view)
        if self.normalize is not None:
            return missing
        return missing + len(list(takewhile(lambda size: size == 1, self.view)))

    def weight_gradients(self, inputs: Tensor, output_gradients: Tensor) -> Tensor:
        """Multiply inputs and output gradients, and sum where the weight was broadcast."""
        if self.normalize is not None:
            inputs = self.normalize(inputs.flatten(0, 1)).view_as(inputs)
        return self._sum(inputs * output_gradients, self.weight)

    def bias_gradients(self, output_gradients: Tensor) -> Tensor:
        """Sum the output gradients where the bias was broadcast."""
        return self._sum(self.sign * output_gradients, self.bias)

    def _sum(self, products: Tensor, parameter: Tensor | None) -> Tensor:
        """Sum `[n, rows, *rest]` over the axes along which the parameter does not vary."""
        view = (1,) * (self.input.ndim - len(self.view)) + self.view
        merged = self.input.ndim + 2 - products.ndim
        # A single batch axis is the first or second, whichever the parameter does not vary along.
        rest = view[merged:] if merged > 1 or view[0] == 1 else (view[0], *view[2:])
        axes = [1, *(2 + i for i, size in enumerate(rest) if size == 1)]
        shape = () if parameter is None else parameter.shape
        return products.sum(dim=axes).reshape(len(products), *shape)


def scale(is_parameter: IsParameter, input: Tensor, other: Tensor) -> ElementwiseCall | None:
    """Read the arguments of `torch.mul`, where one factor is a parameter."""
    data, parameter = (other, input) if is_parameter(input) else (input, other)
    if not isinstance(data, Tensor) or is_parameter(data):
        return None
    expanded = torch.broadcast_tensors(data, parameter)[0]  # type: ignore[no-untyped-call]
    return _if_shared(ElementwiseCall(expanded, parameter, None, view=tuple(parameter.shape)))


def shift(sign: float) -> Callable[..., ElementwiseCall | None]:
    """Return the reader of the arguments of `torch.add` (sign 1) or `torch.sub` (sign -1)."""

    def read(
        is_parameter: IsParameter, input: Tensor, other: Tensor, *, alpha: float = 1
    ) -> ElementwiseCall | None:
        data, parameter, factor = input, other, sign * alpha
        if is_parameter(input):
            data, parameter, factor = other, input, 1.0
        if not isinstance(data, Tensor) or is_parameter(data):
            return None
        # Only the shape is needed: a view of one number, which nobody will modify.
        number = torch.zeros((), dtype=data.dtype, device=data.device)
        shapes = (number, data.detach(), parameter.detach())
        like = torch.broadcast_tensors(*shapes)[0]  # type: ignore[no-untyped-call]
        view = tuple(parameter.shape)
        return _if_shared(ElementwiseCall(like, None, parameter, view=view, sign=factor))

    return read


def _if_shared(call: ElementwiseCall) -> ElementwiseCall | None:
    """Return the call unless the parameter varies along every axis that could hold examples."""
    return call if call.batch_axes else None
