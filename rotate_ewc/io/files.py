"""Snapshots in safetensors files: written whole or not at all, read whole or refused.

A file holds tensors and text, no code: reading one cannot run anything. It also holds a digest of
everything in it, so that any damage is noticed. A digest is not a signature: anyone who can write
the file can also compute a new one.
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
from rotate_ewc.io.header import HEADER, header_text

DIGEST: Final = "digest"

# File names have up to 255 bytes, and a character takes up to four.
_MOST_CHARACTERS: Final = 50


def save(state: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a snapshot to a safetensors file: whole, or not at all.

    It is written under another name in the same folder, flushed to disk and renamed. A process that
    is killed leaves the old file or the new one, and perhaps one whose name begins with a dot. A
    symbolic link is replaced; the file that it points to is left alone.

    Args:
        state: The snapshot: tensors and the header.
        path: The file; an older one is replaced.

    Raises:
        FileNotFoundError: If the folder does not exist.
        IsADirectoryError: If the path is a folder.
        OSError: If the file cannot be written, for example because the disk is full.
        TypeError: If `path` is not a path.
    """
    target = _as_path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(
            f"there is no folder {os.fspath(target.parent)!r} to save in; expected a path in an "
            f"existing folder: create it first"
        )
    if target.is_dir():
        raise IsADirectoryError(
            f"path {os.fspath(target)!r} is a folder; expected the name of a file"
        )
    tensors = _separate({key: value for key, value in state.items() if key != HEADER})
    header = header_text(state)
    metadata = {HEADER: header, DIGEST: _digest(header, tensors)}
    # The target's own name may already be as long as names can be.
    temporary = target.parent / f".{uuid.uuid4().hex}.{target.name[:_MOST_CHARACTERS]}"
    try:
        mode = _mode(target, temporary)
        save_file(tensors, temporary, metadata=metadata)
        temporary.chmod(mode)
        _flush_to_disk(temporary)
        os.replace(temporary, target)
    except SafetensorError as error:
        raise OSError(f"{os.fspath(target)!r} cannot be written: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":
        # Windows cannot open folders, and does not need this.
        _flush_to_disk(target.parent)


@contextmanager
def loaded(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """Read a snapshot from a safetensors file; a `SnapshotError` in the context names the file.

    The tensors are copies: nothing that happens to the file later can change them.

    Args:
        path: The file.

    Yields:
        The snapshot.

    Raises:
        SnapshotError: If the file is not one that `save` wrote, or is damaged.
        FileNotFoundError: If there is no file.
        TypeError: If `path` is not a path.
    """
    source = _as_path(path)
    name = os.fspath(source)
    if not source.is_file():
        raise FileNotFoundError(
            f"there is no snapshot file {name!r}; expected the path of a file that save() wrote"
        )
    try:
        yield _read_whole(source)
    except SnapshotError as error:
        raise SnapshotError(str(error), file=name) from error.__cause__


def _read_whole(path: Path) -> dict[str, Any]:
    """Read a file, and read again if another file has replaced it meanwhile.

    safetensors opens it by name more than once, so it may see the old file first and then the new.
    """
    while True:
        before = _identity(path)
        try:
            return _read(path)
        except SnapshotError:
            if _identity(path) == before:
                raise


def _identity(path: Path) -> tuple[int, ...]:
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _read(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            # Copies: the bits of products depend on alignment in memory, and the file may change.
            state: dict[str, Any] = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
            metadata: dict[str, str] = file.metadata() or {}
    # For dtypes that this version of torch lacks, the error is not a SafetensorError.
    except (
        SafetensorError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        RuntimeError,
    ) as error:
        raise SnapshotError(
            f"this is not a snapshot file: {error}; expected a file that save() wrote"
        ) from None
    header = metadata.pop(HEADER, None)
    if header is None:
        raise SnapshotError(
            f"this is not a snapshot file: there is no {HEADER!r} in its metadata; expected a file "
            f"that save() wrote"
        )
    if metadata.get(DIGEST) != _digest(header, state):
        raise SnapshotError(
            f"the file is damaged: its digest is {metadata.get(DIGEST)!r:.99}; expected the digest "
            f"of its contents: save it again, or use another copy"
        )
    return {HEADER: header, **state}


def _as_path(path: str | os.PathLike[str]) -> Path:
    try:
        return Path(path)
    except TypeError:
        raise TypeError(
            f"path is {type(path).__name__}; expected a string or a pathlib.Path"
        ) from None


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors as safetensors wants them: on the CPU, contiguous, sharing no memory."""
    separate: dict[str, Tensor] = {}
    places: set[int] = set()
    for key, tensor in tensors.items():
        moved = tensor.detach().cpu().contiguous()
        storage = moved.untyped_storage()
        shared = storage.nbytes() != moved.nbytes or storage.data_ptr() in places
        separate[key] = moved.clone() if shared else moved
        places.add(storage.data_ptr())
    return separate


def _digest(header: str, tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the header, and of the name, dtype, shape and bytes of every tensor."""
    digest = hashlib.sha256(header.encode())
    for key in sorted(tensors):
        tensor = tensors[key]
        digest.update(repr((key, str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return f"sha256:{digest.hexdigest()}"


def _mode(target: Path, temporary: Path) -> int:
    """Return the permissions of the target, or those of a new file if there is no target yet."""
    temporary.touch(exist_ok=False)
    return (target if target.exists() else temporary).stat().st_mode & 0o777


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
