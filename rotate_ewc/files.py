"""Snapshots ⇄ safetensors files: written whole or not at all, read whole or refused.

A file holds tensors and text, no code: reading one cannot run anything. Beside the header it has a
digest of everything in it, so that damage is noticed wherever it is. A digest is no signature:
whoever can write the file can make a new one.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rotate_ewc.errors import SnapshotError
from rotate_ewc.formats import HEADER

DIGEST: Final = "digest"

# The first format had none.
_WITHOUT_DIGEST: Final = '"rotate_ewc.operator/1"'


def save(state: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a snapshot to a safetensors file: whole, or not at all.

    It is written under another name in the same folder, brought to the disk and renamed. A process
    that is killed leaves the old file or the new one, and perhaps one that begins with a dot.

    Args:
        state: Tensors, and the header.
        path: The file; an older one is replaced.

    Raises:
        FileNotFoundError: If the folder does not exist.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {os.fspath(target.parent)!r} to save in")
    tensors = {key: _own(value) for key, value in state.items() if key != HEADER}
    metadata = {HEADER: state[HEADER], DIGEST: _digest(state[HEADER], tensors)}
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        mode = _mode(target, temporary)
        save_file(tensors, temporary, metadata=metadata)
        temporary.chmod(mode)
        _bring_to_disk(temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":
        # Windows cannot open folders, and does without.
        _bring_to_disk(target.parent)


@contextmanager
def loaded(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """Read a snapshot from a safetensors file; inside, errors about it name the file.

    The file is mapped into memory and its tensors are copied: nothing that happens to it later can
    change them.

    Raises:
        SnapshotError: If the file is not one that `save` wrote, or has been damaged.
        FileNotFoundError: If there is no file.
    """
    name = os.fspath(path)
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no snapshot file {name!r}")
    try:
        yield _read(path)
    except SnapshotError as error:
        raise SnapshotError(f"{name!r}: {error}") from error.__cause__


def _read(path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            # Copies, since products give the same bits only with the same alignment, and nothing
            # that happens to the file can change them.
            state: dict[str, Any] = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
            metadata: dict[str, str] = file.metadata() or {}
    # Dtypes that are newer than the torch at hand are no SafetensorError.
    except (
        SafetensorError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        RuntimeError,
    ) as error:
        raise SnapshotError(f"this is not a snapshot file: {error}") from None
    header = metadata.pop(HEADER, None)
    if header is None:
        raise SnapshotError(
            f"this is not a snapshot file: there is no {HEADER!r} in its metadata; expected a file "
            f"that save wrote"
        )
    if metadata.get(DIGEST) != _digest(header, state) and not (
        DIGEST not in metadata and _WITHOUT_DIGEST in header
    ):
        raise SnapshotError(
            f"the file is damaged: its digest is {metadata.get(DIGEST)!r:.99}, and expected is "
            f"that of its contents; save it anew, or take another copy"
        )
    return {HEADER: header, **state}


def _own(tensor: Tensor) -> Tensor:
    """Return a tensor for a file: on the CPU, contiguous, and no view of a larger one."""
    moved = tensor.detach().cpu().contiguous()
    return moved if moved.untyped_storage().nbytes() == moved.nbytes else moved.clone()


def _digest(header: str, tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the header, and of the name, dtype, shape and bytes of every tensor."""
    digest = hashlib.sha256(header.encode())
    for key in sorted(tensors):
        tensor = tensors[key]
        digest.update(repr((key, str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return f"sha256:{digest.hexdigest()}"


def _mode(target: Path, temporary: Path) -> int:
    """Return the permissions for a file: those it has, or those that new files get."""
    temporary.touch(exist_ok=False)
    return (target if target.exists() else temporary).stat().st_mode & 0o777


def _bring_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
