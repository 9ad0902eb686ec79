"""Snapshots: blocks ⇄ a flat dictionary of tensors and one JSON string, `"header"`.

The header says what every tensor is: its block's parameters, shape and dtype. Reading a snapshot
runs no code and touches no model; everything is checked before anything is returned.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rotate_ewc.errors import SnapshotError
from rotate_ewc.io.header import HEADER, LIBRARY, OPERATOR, read_header, upgraded
from rotate_ewc.io.layouts import BASES, Layout, read_layouts
from rotate_ewc.io.storage_dtype import DTYPES, check_orthonormal, restored_basis, stored_dtype
from rotate_ewc.linalg.block import Block
from rotate_ewc.provenance import Provenance

Contents = tuple[list[Block], dict[str, torch.Size], Provenance]


def pack(
    blocks: Sequence[Block],
    shapes: Mapping[str, Sequence[int]],
    provenance: Provenance,
    dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Return an operator's snapshot: tensors by `"<block>/<attribute>"`, and the header.

    Args:
        blocks: The operator's blocks.
        shapes: The shapes of its parameters by name.
        provenance: Where it comes from.
        dtype: In what the tensors are stored, where that is less than they have.
    """
    header = {"format": OPERATOR, "library": LIBRARY, **describe(blocks, shapes, provenance)}
    return {HEADER: json.dumps(header), **tensors_of(blocks, dtype)}


def unpack(state: Mapping[str, Any]) -> Contents:
    """Read and check an operator's snapshot, of this or an older format.

    Returns:
        Blocks, parameter shapes by name, and the provenance.

    Raises:
        SnapshotError: If anything is missing, left over, of the wrong kind or shape, not finite, or
            negative where it cannot be; or if a basis is not orthonormal.
    """
    current = upgraded(state, OPERATOR)
    tensors = {key: value for key, value in current.items() if key != HEADER}
    return restore(read_header(current, OPERATOR), tensors)


def describe(
    blocks: Sequence[Block], shapes: Mapping[str, Sequence[int]], provenance: Provenance
) -> dict[str, Any]:
    """Return what a header says of an operator."""
    return {
        "parameters": {name: list(shape) for name, shape in shapes.items()},
        "blocks": [
            {
                "parameters": list(block.parameters),
                "transposed": block.transposed,
                "shape": list(block.eigenvalues.shape),
                "dtype": str(block.eigenvalues.dtype).removeprefix("torch."),
                "bases": [name for name in BASES if name in block.tensors],
            }
            for block in blocks
        ],
        "provenance": provenance.to_json(),
    }


def tensors_of(blocks: Sequence[Block], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Return the tensors of blocks by `"<block>/<attribute>"`, perhaps in a smaller dtype."""
    return {
        f"{block.label}/{name}": tensor.detach().to(stored_dtype(tensor.dtype, dtype))
        for block in blocks
        for name, tensor in block.tensors.items()
    }


def restore(
    description: Mapping[str, Any], tensors: Mapping[str, Any], prefix: str = ""
) -> Contents:
    """Make blocks of a description and tensors, of which none may be missing or left over.

    Args:
        description: What `describe` returned, from a source that is not trusted.
        tensors: By `"<block>/<attribute>"`.
        prefix: What messages put in front of the tensors' keys.

    Raises:
        SnapshotError: As `unpack` does.
    """
    layouts, shapes = read_layouts(description)
    used = {key for layout in layouts for key in layout.keys}
    if left_over := sorted(set(tensors) - used):
        raise SnapshotError(f"snapshot has the unexpected key {prefix + left_over[0]!r}")
    provenance = Provenance.from_json(description.get("provenance"))
    return [_block(layout, tensors, prefix) for layout in layouts], shapes, provenance


def _block(layout: Layout, tensors: Mapping[str, Any], prefix: str) -> Block:
    """Return a block with its tensors, checked."""
    found: dict[str, Tensor] = {}
    for name, key in zip(layout.attributes, layout.keys, strict=True):
        if key not in tensors:
            raise SnapshotError(f"snapshot key {prefix + key!r} is missing")
        shape = layout.shape_of(name)
        tensor = checked_tensor(prefix + key, tensors[key], shape, layout.dtype)
        if name in BASES:
            check_orthonormal(prefix + key, tensor)
            found[name] = restored_basis(tensor, layout.dtype)
        elif bool((tensor < 0).any()):
            raise SnapshotError(f"snapshot key {prefix + key!r} has negative values")
        else:
            found[name] = tensor.to(layout.dtype)
    return Block(
        layout.parameters,
        found.get("gradient_basis"),
        found.get("activation_basis"),
        found["eigenvalues"],
        layout.transposed,
    )


def checked_tensor(key: str, value: Any, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return a tensor of a snapshot if it is one, as it should be, and finite.

    Args:
        key: Its key, for messages.
        value: What the snapshot has there.
        shape: The shape that is expected.
        dtype: The dtype that is expected; a smaller one is that in which it was stored.

    Raises:
        SnapshotError: If it is not.
    """
    if not isinstance(value, Tensor):
        raise SnapshotError(f"snapshot key {key!r} is {type(value).__name__}; expected a tensor")
    if value.layout is not torch.strided or value.is_nested or value.is_quantized or value.is_meta:
        raise SnapshotError(
            f"snapshot key {key!r} is sparse, nested, quantized or without data; expected a dense "
            f"tensor"
        )
    smaller = {known for known in DTYPES.values() if known.itemsize < dtype.itemsize}
    if list(value.shape) != list(shape) or value.dtype not in smaller | {dtype}:
        raise SnapshotError(
            f"snapshot key {key!r} is {value.dtype} of shape {list(value.shape)}; expected "
            f"{dtype} of shape {list(shape)}"
        )
    if value.untyped_storage().nbytes() < value.nbytes:
        # To look at it would take what it pretends to have.
        raise SnapshotError(f"snapshot key {key!r} has fewer numbers than its shape has places")
    if not bool(torch.isfinite(value).all()):
        raise SnapshotError(f"snapshot key {key!r} has values that are not finite")
    return value.detach()
