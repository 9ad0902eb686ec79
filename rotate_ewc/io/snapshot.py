"""Snapshots: blocks ⇄ a flat dictionary of tensors, one of which is the `"header"`.

The header says what every tensor is: its block's parameters, shape and dtype. Reading a snapshot
runs no code and touches no model; everything is checked before anything is returned.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rotate_ewc._utils.storage_dtype import stored_dtype
from rotate_ewc._utils.tree import place_of
from rotate_ewc.errors import SnapshotError
from rotate_ewc.io.header import HEADER, LIBRARY, read_header, write_header
from rotate_ewc.io.layout import BASES, BlockLayout, OperatorHeader, OperatorLayout
from rotate_ewc.io.storage_dtype import check_orthonormal, loadable_dtypes
from rotate_ewc.linalg.block import Block
from rotate_ewc.linalg.orthonormal import restored_basis
from rotate_ewc.provenance import Provenance


class OperatorParts(NamedTuple):
    """What an operator is made of.

    Attributes:
        blocks: The blocks.
        parameter_shapes: The shapes of its parameters by name, in order.
        provenance: Where it comes from.
    """

    blocks: list[Block]
    parameter_shapes: dict[str, torch.Size]
    provenance: Provenance


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
        dtype: The dtype in which the tensors are stored, where it is smaller than their own.
    """
    layout = layout_of(blocks, shapes, provenance)
    header = OperatorHeader(layout.parameters, layout.blocks, layout.provenance, LIBRARY)
    device = blocks[0].eigenvalues.device
    return {HEADER: write_header(header, device), **tensors_of(blocks, dtype)}


def unpack(state: Mapping[str, Any]) -> OperatorParts:
    """Read and check an operator's snapshot.

    Raises:
        SnapshotError: If anything is missing, left over, of the wrong kind or shape, not finite, or
            negative where it cannot be; or if a basis is not orthonormal.
    """
    header = read_header(state, OperatorHeader)
    return restore(header, {key: value for key, value in state.items() if key != HEADER})


def differences(
    got: Mapping[str, torch.Size],
    provenance: Provenance,
    expected: Mapping[str, torch.Size],
    expected_provenance: Provenance,
) -> list[str]:
    """Say how a snapshot's matrix differs from another one.

    Args:
        got: The shapes of the snapshot's parameters by name, in order.
        provenance: Where the snapshot comes from.
        expected: The shapes of the other one's parameters.
        expected_provenance: Where the other one comes from.
    """
    found = []
    if missing := [name for name in expected if name not in got]:
        found.append(f"it lacks parameters {missing}")
    if more := [name for name in got if name not in expected]:
        found.append(f"it has parameters {more}")
    for name in expected:
        if name in got and got[name] != expected[name]:
            shapes = f"{list(got[name])} instead of {list(expected[name])}"
            found.append(f"parameter {name!r} has shape {shapes}")
    if not found and list(got) != list(expected):
        found.append(f"its parameters are in the order {list(got)} instead of {list(expected)}")
    for option in ("loss", "reduction", "fisher_type"):
        value, wanted = getattr(provenance, option), getattr(expected_provenance, option)
        if value != wanted:
            found.append(f"{option} is {value!r} instead of {wanted!r}")
    value, wanted = (p.settings.get("temperature", 1.0) for p in (provenance, expected_provenance))
    if value != wanted:
        found.append(f"temperature is {value!r} instead of {wanted!r}")
    return found


def layout_of(
    blocks: Sequence[Block], shapes: Mapping[str, Sequence[int]], provenance: Provenance
) -> OperatorLayout:
    """Return the part of a header that describes an operator."""
    return OperatorLayout(
        {name: tuple(shape) for name, shape in shapes.items()},
        tuple(
            _block_layout(block, shared)
            for block, shared in zip(blocks, shared_bases(blocks), strict=True)
        ),
        provenance,
    )


def shared_bases(blocks: Sequence[Block]) -> list[dict[str, str]]:
    """Return, for every block, the bases it shares with an earlier block, with that block's label.

    Layers with the same input share one basis, which is stored once.
    """
    owners: dict[object, str] = {}
    found = []
    for block in blocks:
        named = {name: t for name, t in block.tensors.items() if name in BASES}
        of_others = {}
        for name, basis in named.items():
            owner = owners.setdefault((name, place_of(basis)), block.label)
            if owner != block.label:
                of_others[name] = owner
        found.append(of_others)
    return found


def _block_layout(block: Block, shared: dict[str, str]) -> BlockLayout:
    return BlockLayout(
        block.parameters,
        block.transposed,
        block.shape,
        block.eigenvalues.dtype,
        tuple(name for name in BASES if name in block.tensors),
        block.ranks,
        shared,
        block.storage_dtype,
    )


def tensors_of(blocks: Sequence[Block], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Return the tensors of blocks by `"<block>/<attribute>"`, perhaps in a smaller dtype."""
    return {
        f"{block.label}/{name}": tensor.detach().to(stored_dtype(tensor.dtype, dtype))
        for block, shared in zip(blocks, shared_bases(blocks), strict=True)
        for name, tensor in block.tensors.items()
        if name not in shared
    }


def restore(layout: OperatorLayout, tensors: Mapping[str, Any], prefix: str = "") -> OperatorParts:
    """Put the tensors of an operator back into blocks; none may be missing or left over.

    Args:
        layout: The operator's part of the header.
        tensors: By `"<block>/<attribute>"`, from a source that is not trusted.
        prefix: The beginning of the tensors' keys, for messages.

    Raises:
        SnapshotError: As `unpack` does.
    """
    used = {
        f"{block.label}/{name}"
        for block in layout.blocks
        for name in block.tensor_shapes
        if name not in block.shared
    }
    if left_over := sorted(set(tensors) - used):
        raise SnapshotError(
            f"snapshot has the unexpected key {prefix + left_over[0]!r}; expected only keys that "
            f"its header names: load an unchanged copy"
        )
    blocks: dict[str, Block] = {}
    for block in layout.blocks:
        shared = {name: getattr(blocks[label], name) for name, label in block.shared.items()}
        blocks[block.label] = _block(block, tensors, prefix, shared)
    return OperatorParts(
        list(blocks.values()),
        {name: torch.Size(shape) for name, shape in layout.parameters.items()},
        layout.provenance,
    )


def _block(
    layout: BlockLayout, tensors: Mapping[str, Any], prefix: str, shared: Mapping[str, Tensor]
) -> Block:
    """Return a block with its own tensors, checked, and the bases it shares with other blocks."""
    found = dict(shared)
    for name, shape in layout.tensor_shapes.items():
        if name in shared:
            continue
        key = f"{layout.label}/{name}"
        if key not in tensors:
            raise SnapshotError(
                f"snapshot key {prefix + key!r} is missing; expected every key that the header "
                f"names: load a complete copy"
            )
        own = layout.dtype_of(name)
        tensor = checked_tensor(prefix + key, tensors[key], shape, loadable_dtypes(own))
        if name in BASES:
            check_orthonormal(prefix + key, tensor)
            found[name] = restored_basis(tensor, own)
        elif bool((tensor < 0).any()):
            raise SnapshotError(
                f"snapshot key {prefix + key!r} has negative values; expected eigenvalues of at "
                f"least 0: load an undamaged copy"
            )
        else:
            found[name] = tensor.to(layout.dtype)
    return Block(
        layout.parameters,
        found.get("gradient_basis"),
        found.get("activation_basis"),
        found["eigenvalues"],
        layout.transposed,
    )


def checked_tensor(
    key: str, value: Any, shape: Sequence[int], dtypes: Collection[torch.dtype]
) -> Tensor:
    """Check and return a tensor of a snapshot: its type, dtype, shape, and that it is finite.

    Args:
        key: Its key, for messages.
        value: The snapshot's value for that key.
        shape: The expected shape.
        dtypes: The allowed dtypes.

    Raises:
        SnapshotError: If any check fails.
    """
    if not isinstance(value, Tensor):
        raise SnapshotError(f"snapshot key {key!r} is {type(value).__name__}; expected a tensor")
    if value.layout is not torch.strided or value.is_nested or value.is_quantized or value.is_meta:
        raise SnapshotError(
            f"snapshot key {key!r} is sparse, nested, quantized or without data; expected a dense "
            f"tensor"
        )
    if list(value.shape) != list(shape) or value.dtype not in dtypes:
        raise SnapshotError(
            f"snapshot key {key!r} is {value.dtype} of shape {list(value.shape)}; expected "
            f"{' or '.join(map(str, dtypes))} of shape {list(shape)}"
        )
    if value.untyped_storage().nbytes() < value.nbytes:
        # An expanded tensor: looking at it would take the memory that it claims to have.
        raise SnapshotError(
            f"snapshot key {key!r} has fewer numbers than its shape requires; expected a tensor "
            f"that stores every entry, not one made by expand()"
        )
    if not bool(torch.isfinite(value).all()):
        raise SnapshotError(
            f"snapshot key {key!r} has values that are not finite; expected finite numbers: load "
            f"an undamaged copy"
        )
    return value.detach()
