"""Operations that are several in one: what they do, in operations for which there are rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor

from rotate_ewc.layers.broadcasting import shape_of_all
from rotate_ewc.layers.spellings import named


def _plus_product(
    input: Tensor, first: Tensor, second: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    """`addmm`, `addmv` and `baddbmm`."""
    product = torch.matmul(first, second)
    product = product if alpha == 1 else product * alpha
    return product + (input if beta == 1 else input * beta)


def _product_of_other(second: Tensor, first: Tensor) -> Tensor:
    """`second.__rmatmul__(first)`."""
    return torch.matmul(first, second)


def _prelu(input: Tensor, weight: Tensor) -> Tensor:
    """The slope of negative numbers is one for each channel, or one for all."""
    if weight.numel() > 1:
        weight = weight.reshape(-1, *(1 for _ in range(input.ndim - 2)))
    return torch.where(input > 0, input, input * weight)


def _bilinear(first: Tensor, second: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear map of the products of all pairs."""
    pairs = (first[..., :, None] * second[..., None, :]).flatten(-2)
    return torch.nn.functional.linear(pairs, weight.flatten(1), bias)


def _masked_fill(input: Tensor, mask: Tensor, value: Tensor) -> Tensor:
    """A single number, wherever the mask is set."""
    return torch.where(mask, value, input)


def _broadcast_tensors(*tensors: Tensor) -> tuple[Tensor, ...]:
    shape = shape_of_all(*tensors)
    return tuple(tensor.expand(shape) for tensor in tensors)


COMPOSITIONS: Final[Mapping[Callable[..., Any], Callable[..., Any]]] = {
    **named(_plus_product, "addmm", "addmv", "baddbmm"),
    **named(_product_of_other, "__rmatmul__"),
    **named(_prelu, "prelu"),
    **named(_masked_fill, "masked_fill"),
    **named(_bilinear, "bilinear"),
    **named(_broadcast_tensors, "broadcast_tensors"),
}
