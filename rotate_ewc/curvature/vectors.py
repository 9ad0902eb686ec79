"""What an operator can be multiplied with: tensor lists and flat tensors, one column or many.

Inside, every form becomes *columns*: for each parameter a tensor `[K, *shape]`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def to_columns(other: Any, shapes: Mapping[str, torch.Size]) -> list[Tensor]:
    """Turn a tensor list or a flat tensor into columns.

    Args:
        other: A list of tensors of the parameters' shapes, each with or without a trailing axis of
            K columns; or `[D]`; or `[D, K]`.
        shapes: Parameter shapes by name, in order.

    Raises:
        ValueError: If a shape does not fit, naming the parameter.
        TypeError: If `other` is neither a tensor nor a list of tensors, or if its numbers are not
            in floating point.
    """
    if isinstance(other, Tensor):
        return _split_flat(other, shapes)
    if not isinstance(other, (list, tuple)):
        raise TypeError(
            f"cannot multiply with {type(other).__name__}; expected a list of tensors shaped like "
            f"the parameters, or a flat tensor"
        )
    if check_list(other, shapes, columns_allowed=True):
        return [tensor.movedim(-1, 0) for tensor in other]
    return [tensor[None] for tensor in other]


def from_columns(columns: Sequence[Tensor], like: Any) -> Any:
    """Turn columns back into the form of `like`."""
    if isinstance(like, Tensor):
        return torch.cat(
            [c.reshape(len(c), c.shape[1:].numel()) for c in columns], dim=1
        ).mT.reshape(like.shape)
    if columns[0].ndim == like[0].ndim:
        return [column.movedim(0, -1) for column in columns]
    return [column[0] for column in columns]


def check_list(
    tensors: Sequence[Tensor], shapes: Mapping[str, torch.Size], *, columns_allowed: bool
) -> bool:
    """Check tensors against the parameters, and return whether they have a column axis."""
    if len(tensors) != len(shapes):
        raise ValueError(f"got {len(tensors)} tensors; expected {len(shapes)}, one per parameter")
    columns: set[tuple[int, ...]] = set()
    for (name, shape), tensor in zip(shapes.items(), tensors, strict=True):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name!r} got {type(tensor).__name__}; expected a tensor")
        _check_dtype(tensor, repr(name))
        extra = tuple(tensor.shape[len(shape) :])
        if tensor.shape[: len(shape)] != shape or len(extra) > int(columns_allowed):
            columns_too = f" or {[*shape, 'K']}".replace("'", "") if columns_allowed else ""
            raise ValueError(
                f"{name!r} got a tensor of shape {list(tensor.shape)}; expected "
                f"{list(shape)}{columns_too}"
            )
        columns.add(extra)
    if len(columns) > 1:
        raise ValueError(
            f"the tensors have different numbers of columns: {sorted(columns)}; expected the same "
            f"number for all"
        )
    return columns != {()}


def _check_dtype(tensor: Tensor, what: str) -> None:
    # The product comes back in the same dtype, and would be rounded to integers.
    if not tensor.is_floating_point():
        raise TypeError(f"{what} got dtype {tensor.dtype}; expected a floating-point dtype")


def _split_flat(flat: Tensor, shapes: Mapping[str, torch.Size]) -> list[Tensor]:
    _check_dtype(flat, "the flat tensor")
    size = sum(shape.numel() for shape in shapes.values())
    if flat.ndim not in (1, 2) or flat.shape[0] != size:
        raise ValueError(
            f"cannot multiply with shape {list(flat.shape)}; expected [{size}] or [{size}, K]"
        )
    rows = flat.reshape(size, -1).mT
    parts = torch.split(rows, [shape.numel() for shape in shapes.values()], dim=1)
    return [
        part.reshape(len(rows), *shape) for part, shape in zip(parts, shapes.values(), strict=True)
    ]
