"""Walk through nested tuples, lists and mappings for the tensors in them.

Not `torch.utils._pytree`: it takes mappings that are no dictionaries, such as the batches of
tokenizers, for leaves, and takes twice as long for the arguments of a torch function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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


def parts_of(tensor: Tensor) -> list[Tensor]:
    """Return the dense tensors that hold a tensor's numbers: several, if it is sparse or nested."""
    layout = tensor.layout
    if tensor.is_nested:
        return list(tensor.unbind())
    if layout is torch.strided:
        return [tensor]
    if layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return [tensor]


def version_of(tensor: Tensor) -> int:
    """How often a tensor was modified in place; those of inference mode cannot be."""
    return 0 if tensor.is_inference() else tensor._version


def same(one: Any, other: Any) -> bool:
    """Whether two nested values have the same structure and equal tensors, and all else is equal.

    What cannot be compared is taken to be different, unless it is the same object.
    """
    if type(one) is not type(other):
        return False
    if isinstance(one, Mapping):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(same, one, other))
    if one is other:
        return True
    try:
        if not isinstance(one, Tensor):
            return bool(one == other)
        return _same_tensors(one, other)
    except (TypeError, ValueError, RuntimeError):
        return False


def _same_tensors(one: Tensor, other: Tensor) -> bool:
    if (one.dtype, one.device, one.layout) != (other.dtype, other.device, other.layout):
        return False
    if not one.is_nested and one.shape != other.shape:
        return False
    return len(parts_of(one)) == len(parts_of(other)) and all(
        map(torch.equal, parts_of(one), parts_of(other))
    )


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Return a nested value with every tensor replaced by `function` of it."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(function, item) for key, item in value.items()}
    if not isinstance(value, (tuple, list)):
        return value
    mapped = [map_tensors(function, item) for item in value]
    return type(value)(*mapped) if hasattr(value, "_fields") else type(value)(mapped)


def to_device(value: Any, device: torch.device) -> Any:
    """Move the tensors in a nested value to a device; a value that is there already is kept.

    Tensors that were made in inference mode are copied: layers cannot keep them for gradients.
    """
    if all(t.device == device and not t.is_inference() for t in tensors_in(value)):
        return value
    return map_tensors(lambda t: t.to(device, copy=t.is_inference()), value)


def memory_of(tensor: Tensor) -> tuple[int, int]:
    """Return the address and the bytes of what a tensor is a view of."""
    try:
        storage = tensor.untyped_storage()
        return storage.data_ptr(), storage.nbytes()
    except NotImplementedError:
        # A tensor inside a transform of `torch.func` only stands for another one.
        return id(tensor), tensor.nbytes


def place_of(tensor: Tensor) -> object:
    """Return where in memory a dense tensor's numbers are, and how they lie there.

    Two living tensors have the same place if, and only if, they have the same numbers for ever.
    """
    if not tensor.numel() or tensor.is_meta:
        return id(tensor)
    layout = tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device
    return memory_of(tensor)[0], layout
