"""The header of a snapshot, written, and read without trust in it.

A header is JSON, with the schema of `rotate_ewc.io.layout`: in dictionaries its bytes, as a uint8
tensor, since frameworks that save, average or share the states of modules handle tensors alone; in
files a string in the metadata. Whatever is wrong with it is explained, with the value and its
place.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final, TypeVar

import msgspec
import torch
from msgspec import Raw
from torch import Tensor

from rotate_ewc.errors import SnapshotError
from rotate_ewc.io.layout import OPERATOR, PENALTY, OperatorHeader, PenaltyHeader, Shape
from rotate_ewc.io.storage_dtype import DTYPES
from rotate_ewc.options import FisherType, Reduction
from rotate_ewc.provenance import Setting
from rotate_ewc.version import __version__

HEADER: Final = "header"
LIBRARY: Final = f"rotate_ewc {__version__}"

AnyHeader = OperatorHeader | PenaltyHeader
HeaderType = TypeVar("HeaderType", OperatorHeader, PenaltyHeader)


def write_header(header: AnyHeader, device: torch.device | None = None) -> Tensor:
    """Return the bytes of a header's JSON, as a uint8 tensor."""
    return torch.frombuffer(bytearray(_ENCODER.encode(header)), dtype=torch.uint8).to(device)


def header_text(state: Mapping[str, Any]) -> str:
    """Return the JSON of a snapshot's header.

    Raises:
        SnapshotError: If the header is missing or is not text.
    """
    value = state.get(HEADER)
    if isinstance(value, str):
        return value
    if not isinstance(value, Tensor) or value.ndim != 1 or value.layout is not torch.strided:
        raise SnapshotError(
            f"snapshot key {HEADER!r} is {type(value).__name__}; expected a uint8 tensor of the "
            f"bytes of a JSON text, as state_dict() writes it"
        )
    if value.is_meta or value.untyped_storage().nbytes() < value.nbytes:
        raise SnapshotError(
            f"snapshot key {HEADER!r} has fewer bytes than its shape requires; expected a tensor "
            f"that stores every byte, as state_dict() writes it"
        )
    whole = value.detach().cpu()
    if whole.is_floating_point():
        whole = _averaged(whole)
    if whole.dtype is not torch.uint8:
        raise SnapshotError(
            f"snapshot key {HEADER!r} is {value.dtype}; expected torch.uint8, as state_dict() "
            f"writes it"
        )
    try:
        return bytes(whole.contiguous().numpy()).decode()
    except UnicodeDecodeError as error:
        raise SnapshotError(_not_json(error)) from None


def _averaged(values: Tensor) -> Tensor:
    """Return the bytes of a header that has become floating point by averaging equal states.

    Raises:
        SnapshotError: If the numbers are not nearly whole, as after averaging different states.
    """
    nearest = values.double().round()
    if not bool(((values - nearest).abs() < _ROUNDING).all() & (nearest.abs() < 256).all()):
        raise SnapshotError(
            f"snapshot key {HEADER!r} is {values.dtype} but not whole numbers, as if it had been "
            f"averaged with another snapshot; expected torch.uint8: average only models "
            f"whose penalties hold the same tasks"
        )
    return nearest.to(torch.uint8)


def read_header(state: Mapping[str, Any], kind: type[HeaderType]) -> HeaderType:
    """Read and check the header of a snapshot of one kind.

    Raises:
        SnapshotError: If it is missing, does not match the schema, or is of another kind.
    """
    header = read_any_header(state)
    if not isinstance(header, kind):
        got, expected = (each.__struct_config__.tag for each in (type(header), kind))
        raise SnapshotError(
            f"snapshot format is {got!r}; expected {expected!r}: load it into an object of the "
            f"class that wrote it"
        )
    return header


def read_any_header(state: Mapping[str, Any]) -> AnyHeader:
    """Read and check the header of a snapshot of any kind.

    Raises:
        SnapshotError: If it is missing or does not match the schema.
    """
    if not isinstance(state, Mapping):
        raise SnapshotError(
            f"snapshot is {type(state).__name__}; expected a dictionary, as state_dict() returns it"
        )
    for key in state:
        if not isinstance(key, str):
            raise SnapshotError(
                f"snapshot has the key {key!r:.99}; expected all to be strings: {_REMEDY}"
            )
    text = header_text(state)
    try:
        return _DECODER.decode(text)
    except msgspec.ValidationError as error:
        raise SnapshotError(_explained(str(error), text)) from None
    # Text with half of a surrogate pair cannot be encoded: UnicodeError.
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise SnapshotError(_not_json(error)) from None


def _not_json(error: Exception) -> str:
    return f"snapshot key {HEADER!r} is not JSON: {error}; expected JSON text: {_REMEDY}"


def _explained(message: str, text: str) -> str:
    """Return a message of msgspec together with the value that it is about.

    Args:
        message: Such as ``Expected `int` >= 0 - at `$.parameters[...][1]` ``.
        text: The header.
    """
    reason, _, rest = message.partition(" - at `$.")
    path, found = _located(rest.rstrip("`"), text)
    if path == "format":
        return (
            f"snapshot format is {found:.99}; expected {OPERATOR!r} or {PENALTY!r}: perhaps it was "
            f"written by a later version than {LIBRARY}"
        )
    if (choices := _CHOICES.get(path.rpartition(".")[2])) is not None and found.startswith('"'):
        # msgspec does not list the choices.
        reason = f"Expected one of {', '.join(choices)}"
    value = "" if found.startswith("{") else f" has {found:.99}"
    place = f" at {path!r}" if path else ""
    return f"snapshot key {HEADER!r}{value}{place}: {reason}: {_REMEDY}"


def _located(path: str, text: str) -> tuple[str, str]:
    """Return a path with its dictionary key, which msgspec leaves out, and the JSON text there.

    Args:
        path: Such as `parameters[...][1]`.
        text: The header.
    """
    found, field = Raw(text.encode()), ""
    try:
        for step in re.findall(r"\w+|\.{3}", path):
            if step.isdecimal():
                found = msgspec.json.decode(found, type=list[Raw])[int(step)]
                continue
            members = msgspec.json.decode(found, type=dict[str, Raw])
            if step == "...":
                step = next(n for n, m in members.items() if not _is_a(m, _MEMBERS[field]))
                path = path.replace("...", f"{step!r:.99}")
            found, field = members[step], step
    # After the wrong value the text may not be JSON, or may repeat a name.
    except (msgspec.DecodeError, ValueError, LookupError, RecursionError, StopIteration):
        return path, "something"
    return path, bytes(found).decode()


def _is_a(member: Raw, kind: Any) -> bool:
    try:
        msgspec.json.decode(member, type=kind)
    except msgspec.ValidationError:
        return False
    return True


def _dtype_name(value: object) -> str:
    """Encode a dtype, which JSON does not know, by its name."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    raise NotImplementedError(f"headers cannot have {type(value).__name__}")


def _dtype(_: type, value: object) -> torch.dtype:
    """Decode a dtype from its name."""
    if isinstance(value, str) and value in DTYPES:
        return DTYPES[value]
    raise ValueError(f"Expected one of {', '.join(DTYPES)}")


_REMEDY: Final = "load an unchanged copy, or save the snapshot again"

# How far the average of equal bytes may be from these bytes.
_ROUNDING: Final = 1e-2

# The types of the values in dictionaries, by the names of the dictionaries.
_MEMBERS: Final[dict[str, Any]] = {"parameters": Shape, "settings": Setting, "options": Setting}

_CHOICES: Final = {"reduction": Reduction, "fisher_type": FisherType}

_ENCODER: Final = msgspec.json.Encoder(enc_hook=_dtype_name)
_DECODER: Final[msgspec.json.Decoder[AnyHeader]] = msgspec.json.Decoder(AnyHeader, dec_hook=_dtype)
