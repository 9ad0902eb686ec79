"""Snapshots: blocks ⇄ a flat dictionary ⇄ a safetensors file.

A snapshot holds tensors and one JSON string, `"header"`, which says what the tensors are. Reading
one runs no code and touches no model; everything is checked before anything is returned.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rotate_ewc.block import Block

FORMAT: Final = "rotate_ewc.operator/1"
HEADER: Final = "header"


class SnapshotError(ValueError):
    """A snapshot that cannot be used; the message names the key, what was got and expected."""


@dataclass(frozen=True)
class Provenance:
    """Where an operator comes from.

    Attributes:
        loss: Class name of the loss.
        reduction: The loss's reduction, `"mean"` or `"sum"`.
        fisher_type: Value of the `FisherType`.
        num_data: Examples the operator stands for.
    """

    loss: str
    reduction: str
    fisher_type: str
    num_data: int

    def __str__(self) -> str:
        """Say it in a few words."""
        return f"{self.fisher_type} Fisher of {self.loss} ({self.reduction}), N = {self.num_data}"


def pack(
    blocks: Sequence[Block], shapes: Mapping[str, Sequence[int]], provenance: Provenance
) -> dict[str, Any]:
    """Return an operator's snapshot: tensors by `"<block>/<attribute>"`, and the header."""
    header = {
        "format": FORMAT,
        "parameters": {name: list(shape) for name, shape in shapes.items()},
        "blocks": [
            {"parameters": list(block.parameters), "transposed": block.transposed}
            for block in blocks
        ],
        "provenance": asdict(provenance),
    }
    tensors = {
        f"{block.label}/{name}": tensor.detach()
        for block in blocks
        for name, tensor in block.tensors.items()
    }
    return {HEADER: json.dumps(header), **tensors}


def unpack(state: Mapping[str, Any]) -> tuple[list[Block], dict[str, list[int]], Provenance]:
    """Read and check a snapshot.

    Returns:
        Blocks, parameter shapes by name, and the provenance.

    Raises:
        SnapshotError: If anything is missing, left over, of the wrong kind or shape, not finite, or
            negative where it cannot be.
    """
    header = read_header(state, FORMAT)
    shapes, layouts, provenance = _described(header)
    blocks, used = [], {HEADER}
    for parameters, transposed in layouts:
        label = "+".join(parameters)
        tensors = {}
        for attribute in ("eigenvalues", "gradient_basis", "activation_basis"):
            key = f"{label}/{attribute}"
            if key in state:
                tensors[attribute] = _checked_tensor(key, state[key])
                used.add(key)
        blocks.append(_checked_block(parameters, transposed, tensors, shapes))
    if left_over := sorted(set(state) - used):
        raise SnapshotError(f"snapshot has the unexpected key {left_over[0]!r}")
    return blocks, shapes, provenance


def read_header(state: Mapping[str, Any], expected_format: str) -> dict[str, Any]:
    """Return a snapshot's header as a dictionary, or raise `SnapshotError`."""
    if not isinstance(state, Mapping):
        raise SnapshotError(f"snapshot is {type(state).__name__}; expected a dictionary")
    text = state.get(HEADER)
    if not isinstance(text, str):
        raise SnapshotError(
            f"snapshot key {HEADER!r} is {type(text).__name__}; expected a JSON string, as "
            f"state_dict() writes it"
        )
    try:
        header = json.loads(text)
    except ValueError as error:
        raise SnapshotError(f"snapshot key {HEADER!r} is not JSON: {error}") from None
    got = header.get("format") if isinstance(header, dict) else None
    if got != expected_format:
        raise SnapshotError(f"snapshot format is {got!r}; expected {expected_format!r}")
    return dict(header)


def save(state: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a snapshot to a safetensors file: whole, or not at all.

    Raises:
        FileNotFoundError: If the folder does not exist.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {os.fspath(target.parent)!r} to save in")
    tensors = {key: value.contiguous() for key, value in state.items() if key != HEADER}
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        save_file(tensors, temporary, metadata={HEADER: state[HEADER]})
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a snapshot from a safetensors file.

    Raises:
        SnapshotError: If the file is not one that `save` wrote.
        FileNotFoundError: If there is no file.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"there is no snapshot file {os.fspath(path)!r}")
    try:
        with safe_open(path, framework="pt") as file:
            state: dict[str, Any] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            state.update(file.metadata() or {})
    except SafetensorError as error:
        raise SnapshotError(f"{os.fspath(path)!r} is not a snapshot file: {error}") from None
    return state


def _described(
    header: Mapping[str, Any],
) -> tuple[dict[str, list[int]], list[tuple[tuple[str, ...], bool]], Provenance]:
    """Return parameter shapes, every block's parameters and whether it is transposed, and more."""
    try:
        shapes = {str(n): [int(s) for s in shape] for n, shape in header["parameters"].items()}
        provenance = Provenance(**header["provenance"])
        layouts = [
            (tuple(map(str, block["parameters"])), bool(block["transposed"]))
            for block in header["blocks"]
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SnapshotError(f"snapshot key {HEADER!r} is incomplete: {error}") from None
    named = [name for parameters, _ in layouts for name in parameters]
    if sorted(named) != sorted(shapes):
        raise SnapshotError(
            f"snapshot blocks are for parameters {sorted(named)}; expected {sorted(shapes)}"
        )
    return shapes, layouts, provenance


def _checked_tensor(key: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise SnapshotError(f"snapshot key {key!r} is {type(value).__name__}; expected a tensor")
    if not value.is_floating_point() or value.ndim != 3:
        raise SnapshotError(
            f"snapshot key {key!r} is {value.dtype} of shape {list(value.shape)}; expected a "
            f"floating-point tensor with three axes"
        )
    if not bool(torch.isfinite(value).all()):
        raise SnapshotError(f"snapshot key {key!r} has values that are not finite")
    return value.detach()


def _checked_block(
    parameters: tuple[str, ...],
    transposed: bool,
    tensors: Mapping[str, Tensor],
    shapes: Mapping[str, Sequence[int]],
) -> Block:
    label = "+".join(parameters)
    eigenvalues = tensors.get("eigenvalues")
    if eigenvalues is None:
        raise SnapshotError(f"snapshot key {label + '/eigenvalues'!r} is missing")
    if bool((eigenvalues < 0).any()):
        raise SnapshotError(f"snapshot key {label + '/eigenvalues'!r} has negative values")
    size = sum(torch.Size(shapes[name]).numel() for name in parameters)
    if eigenvalues.numel() != size:
        raise SnapshotError(
            f"snapshot key {label + '/eigenvalues'!r} has {eigenvalues.numel()} values; expected "
            f"{size} for parameters of shapes {[list(shapes[name]) for name in parameters]}"
        )
    groups, d_out, d_in = eigenvalues.shape
    for side, size in (("gradient_basis", d_out), ("activation_basis", d_in)):
        basis = tensors.get(side)
        if basis is not None and (
            tuple(basis.shape) != (groups, size, size) or basis.dtype != eigenvalues.dtype
        ):
            raise SnapshotError(
                f"snapshot key {label + '/' + side!r} is {basis.dtype} of shape "
                f"{list(basis.shape)}; expected {eigenvalues.dtype} of shape {[groups, size, size]}"
            )
    return Block(
        parameters,
        tensors.get("gradient_basis"),
        tensors.get("activation_basis"),
        eigenvalues,
        transposed,
    )
