"""Functions that broadcast a parameter to the shape of data: only the copies meet the data.

The gradient of a parameter is then the sum of those of its copies, whatever the function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from rotate_ewc._utils.tree import tensors_in
from rotate_ewc.layers.spellings import named

Arguments = tuple[Sequence[Any], Mapping[str, Any]]


def shape_of_all(*args: Any, **kwargs: Any) -> torch.Size:
    """Return the shape to which all tensors among some arguments are broadcast."""
    shapes = (tensor.shape for tensor in tensors_in((args, kwargs)))
    return torch.Size(torch.broadcast_shapes(*shapes))  # type: ignore[no-untyped-call]


def _shape_of_first(target: Tensor, *_: Any, **__: Any) -> torch.Size:
    return target.shape


def _shape_of_item(target: Tensor, index: Any, _: Any) -> torch.Size:
    return target.detach()[index].shape


def _shape_of_mask(query: Tensor, key: Tensor, *_: Any, **__: Any) -> torch.Size:
    return torch.Size((*query.shape[:-1], key.shape[-2]))


_BOTH: Final = (
    *("mul", "multiply", "div", "divide", "true_divide", "pow", "float_power", "atan2", "arctan2"),
    *("sub", "subtract", "add", "lerp", "addcmul", "addcdiv", "clamp", "clip", "xlogy"),
    *("fmod", "remainder", "copysign", "hypot", "ldexp"),
)
_FUNCTIONS: Final = (
    *("where", "rsub", "maximum", "minimum", "max", "min", "fmax", "fmin", "logaddexp"),
    *("logaddexp2", "clamp_min", "clamp_max"),
)
_OPERATORS: Final = (
    *("__rdiv__", "__rtruediv__", "__pow__", "__ipow__", "__rpow__", "__rsub__", "__truediv__"),
    *("__itruediv__", "__idiv__", "__mod__", "__rmod__", "__rmul__", "__radd__"),
)

SHAPES: Final[Mapping[Callable[..., Any], Callable[..., torch.Size]]] = {
    **named(shape_of_all, *_BOTH, *(f"{name}_" for name in _BOTH), *_FUNCTIONS, *_OPERATORS),
    **named(_shape_of_mask, "scaled_dot_product_attention"),
    Tensor.copy_: _shape_of_first,
    Tensor.__setitem__: _shape_of_item,
}
"""For every function that broadcasts tensors, what finds the shape from its arguments."""


def broadcast_shape(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> torch.Size | None:
    """Return the shape to which a function broadcasts parameters; None where it does not."""
    find = SHAPES.get(function)
    if find is None:
        return None
    try:
        return find(*args, **kwargs)
    except (IndexError, RuntimeError, TypeError):  # as the function itself will say
        return None
