"""Outputs and targets that are several tensors, as one tensor and back again.

Unlike `_utils.tree`, which is quick, this keeps the types of mappings and knows dataclasses, such
as the outputs of a Hugging Face model, so that a user's loss finds what it expects.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor


def mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """Return a nested value of the same types with `function` of every leaf, depth first.

    Tuples, lists, mappings and dataclasses are opened; all else is a leaf.
    """
    if isinstance(value, Mapping):
        items = {key: mapped(function, item) for key, item in value.items()}
        if type(value) is dict or not isinstance(value, MutableMapping):
            return items
        other: Any = copy.copy(value)
        for key, item in items.items():
            other[key] = item
        return other
    if isinstance(value, (tuple, list)):
        parts = [mapped(function, item) for item in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if is_dataclass(value) and not isinstance(value, (type, Place)):
        other = copy.copy(value)
        for entry in fields(value):
            # Also where the class is frozen.
            object.__setattr__(other, entry.name, mapped(function, getattr(value, entry.name)))
        return other
    return function(value)


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a nested value, depth first."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_of(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_of(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for entry in fields(value):
            yield from tensors_of(getattr(value, entry.name))


def part_of(value: Any, key: Any) -> Any:
    """Return an item of a mapping, tuple or list, or an attribute of a dataclass.

    Raises:
        LookupError: If there is none.
    """
    if isinstance(value, (Mapping, tuple, list)):
        try:
            return value[key]
        except TypeError as error:
            raise LookupError(f"{type(value).__name__} has no {key!r}") from error
    if is_dataclass(value) and isinstance(key, str) and hasattr(value, key):
        return getattr(value, key)
    raise LookupError(f"{type(value).__name__} has no {key!r}")


@dataclass(frozen=True)
class Place:
    """Where a tensor of the packed outputs has been.

    Attributes:
        rows: How many of its rows lie in one of the packed tensor.
        rest: Its other axes.
    """

    rows: int
    rest: tuple[int, ...]

    @property
    def columns(self) -> int:
        """How many columns it takes."""
        return self.rows * math.prod(self.rest)


@dataclass(frozen=True)
class Packing:
    """How several tensors lie in one, `[rows, columns]`.

    Attributes:
        template: The nested value, with a `Place` for each of the tensors.
    """

    template: Any

    def unpacked(self, packed: Tensor) -> Any:
        """Return the nested value of a packed tensor, which may be cut to some of its rows."""
        start = 0

        def taken(leaf: Any) -> Any:
            nonlocal start
            if not isinstance(leaf, Place):
                return leaf
            part = packed[:, start : start + leaf.columns]
            start += leaf.columns
            return part.reshape(len(packed) * leaf.rows, *leaf.rest)

        return mapped(taken, self.template)


def packed(value: Any) -> tuple[Tensor, Packing | None]:
    """Return the floating-point tensors of a nested value as one, which keeps them by rows.

    Each row of it holds as many rows of every tensor as there are for the greatest common divisor
    of their numbers, so that what belongs to an example stays together.

    Args:
        value: A tensor, which is returned as it is, or a nested value.

    Raises:
        TypeError: If there is no floating-point tensor.
        ValueError: If one of them has no axis of examples but depends on parameters.
    """
    if isinstance(value, Tensor):
        return value, None
    tensors = [tensor for tensor in tensors_of(value) if tensor.is_floating_point()]
    scalars = [tensor for tensor in tensors if not tensor.ndim and tensor.requires_grad]
    tensors = [tensor for tensor in tensors if tensor.ndim]
    if not tensors or scalars:
        shapes = [list(tensor.shape) for tensor in tensors] + [[]] * len(scalars)
        kind = ValueError if tensors else TypeError
        raise kind(
            f"model returned {type(value).__name__} with floating-point tensors of shapes {shapes};"
            f" expected tensors with the examples on the first axis: pass forward=, a function from"
            f" a batch's inputs to only the outputs that the loss needs; or ModelLoss, for a loss "
            f"that the model computes itself"
        )
    rows = math.gcd(*(len(tensor) for tensor in tensors))
    if not rows:
        raise ValueError("the model's outputs have no rows; expected at least one example")

    def placed(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if not leaf.is_floating_point() or not leaf.ndim:
            return leaf.detach()
        return Place(len(leaf) // rows, tuple(leaf.shape[1:]))

    whole = torch.cat([tensor.reshape(rows, -1) for tensor in tensors], dim=1)
    return whole, Packing(mapped(placed, value))


def packed_like(value: Any, rows: int) -> Tensor:
    """Return the floating-point tensors of a nested value as one with a given number of rows."""
    tensors = [t for t in tensors_of(value) if t.is_floating_point() and t.ndim]
    return torch.cat([tensor.reshape(rows, -1) for tensor in tensors], dim=1)
