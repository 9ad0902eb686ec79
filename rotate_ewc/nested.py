"""Walk through nested tuples, lists and mappings for the tensors in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a nested value, depth first."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)


def to_device(value: Any, device: torch.device) -> Any:
    """Move the tensors in a nested value to a device; a value that is there already is kept."""
    if all(tensor.device == device for tensor in tensors_in(value)):
        return value
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: to_device(item, device) for key, item in value.items()}
    moved = [to_device(item, device) for item in value]
    return type(value)(*moved) if hasattr(value, "_fields") else type(value)(moved)
