"""The header of a snapshot: its schema, declared once, and read without trust in it.

A header is JSON: in dictionaries its bytes, as a uint8 tensor, since frameworks that save, average
or share the states of modules handle tensors alone; in files a string in the metadata. `msgspec`
parses it and checks the names, types and ranges of all fields in the same pass; each
`__post_init__` checks what has to fit together.

The number in a format is its version. All kinds of snapshots have the same.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from math import prod
from typing import Annotated, Any, Final, TypeVar

import msgspec
import torch
from msgspec import Meta, Raw, Struct
from torch import Tensor

from rotate_ewc.errors import SnapshotError
from rotate_ewc.io.storage_dtype import DTYPES
from rotate_ewc.options import FisherType, Reduction
from rotate_ewc.provenance import LARGEST_COUNT, Provenance, Setting
from rotate_ewc.version import __version__

HEADER: Final = "header"
LIBRARY: Final = f"rotate_ewc {__version__}"
OPERATOR: Final = "rotate_ewc.operator/1"
PENALTY: Final = "rotate_ewc.penalty/1"

BASES: Final = ("gradient_basis", "activation_basis")

Size = Annotated[int, Meta(ge=0, lt=2**48)]
# No tensor has more axes. Without a limit, multiplying a million sizes would take minutes.
Shape = Annotated[tuple[Size, ...], Meta(max_length=64)]


class _Object(Struct, frozen=True, forbid_unknown_fields=True):
    """An object in JSON, with the fields of the class and no others."""


class BlockLayout(_Object, frozen=True, omit_defaults=True):
    """One block of an operator.

    Attributes:
        parameters: Its parameter, or those of a weight and its bias.
        transposed: Whether the input side comes first in the (weight) parameter.
        shape: `(groups, d_out, d_in)`.
        dtype: The dtype of its tensors in memory, whichever dtype the file stores.
        bases: The bases that it has, in the order of `BASES`.
        ranks: How many directions are kept of each side, `(k_out, k_in)`: d, or less if it is thin.
        shared: For each basis that an earlier block stores, by the name of the basis, the label of
            that block. Left out where there are none.
        storage_dtype: The dtype of its bases in memory, if it differs from `dtype`.
    """

    parameters: Annotated[tuple[str, ...], Meta(min_length=1, max_length=2)]
    transposed: bool
    shape: tuple[Size, Size, Size]
    dtype: torch.dtype
    bases: tuple[str, ...]
    ranks: tuple[Size, Size]
    shared: dict[str, str] = msgspec.field(default_factory=dict)
    storage_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        """Raise `ValueError` if bases, ranks or dtypes do not fit together."""
        if self.bases != tuple(name for name in BASES if name in self.bases):
            raise ValueError(f"'bases' is {list(self.bases)!r:.99}; expected some of {BASES}")
        if not self.shared.keys() <= set(self.bases):
            raise ValueError(f"'shared' has {list(self.shared)!r:.99}; expected some of 'bases'")
        if self.storage_dtype is not None and self.storage_dtype.itemsize > self.dtype.itemsize:
            raise ValueError(
                f"'storage_dtype' is {self.storage_dtype}; expected none larger than {self.dtype}, "
                f"the dtype of the block"
            )
        for name, size, rank in zip(BASES, self.shape[1:], self.ranks, strict=True):
            if rank != size and not (name in self.bases and 0 < rank < size):
                raise ValueError(
                    f"'ranks' is {list(self.ranks)}, but the side of {name!r} has {size} entries; "
                    f"expected from 1 to {size}, and {size} where there is no basis"
                )

    @property
    def label(self) -> str:
        """The block's name."""
        return "+".join(self.parameters)

    @property
    def tensor_shapes(self) -> dict[str, tuple[int, int, int]]:
        """The shapes of its tensors by attribute name, including bases that other blocks store."""
        groups, *sizes = self.shape
        sides = dict(zip(BASES, zip(sizes, self.ranks, strict=True), strict=True))
        # A thin side has one more row or column, for its complement.
        k_out, k_in = (rank + (rank < size) for size, rank in sides.values())
        bases = {name: (groups, *sides[name]) for name in self.bases}
        return {"eigenvalues": (groups, k_out, k_in), **bases}

    def dtype_of(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor in memory, by its attribute name."""
        return self.storage_dtype or self.dtype if name in BASES else self.dtype

    def can_share(self, name: str, other: BlockLayout) -> bool:
        """Tell whether the block can share the basis of this name that another block stores."""
        stored = name in other.bases and name not in other.shared
        same = self.dtype_of(name) == other.dtype_of(name)
        return stored and same and self.tensor_shapes[name] == other.tensor_shapes[name]

    def fits(self, shapes: Sequence[Sequence[int]]) -> bool:
        """Tell whether parameters of these shapes have as many entries as the block has room for.

        Args:
            shapes: The shape of the parameter, or those of the weight and the bias.
        """
        groups, d_out, d_in = self.shape
        weight = groups * d_out * (d_in - (len(shapes) - 1))
        return [prod(shape) for shape in shapes] == [weight, groups * d_out][: len(shapes)]


class OperatorLayout(_Object, frozen=True):
    """An operator without its tensors.

    Attributes:
        parameters: The shapes of its parameters by name, in order.
        blocks: Its blocks, which together hold every parameter once.
        provenance: Where it comes from.
    """

    parameters: Annotated[dict[str, Shape], Meta(min_length=1)]
    blocks: tuple[BlockLayout, ...]
    provenance: Provenance

    def __post_init__(self) -> None:
        """Raise `ValueError` unless blocks and parameters fit together."""
        held = Counter(name for block in self.blocks for name in block.parameters)
        for name in sorted({*held, *self.parameters}):
            if name not in self.parameters:
                raise ValueError(
                    f"{name!r} is in a block, but not among the parameters; expected it in both"
                )
            if held[name] != 1:
                raise ValueError(f"parameter {name!r} is in {held[name]} blocks; expected one")
        if len({block.label for block in self.blocks}) < len(self.blocks):
            raise ValueError("two blocks have the same label; expected different ones")
        before: dict[str, BlockLayout] = {}
        for block in self.blocks:
            for name, label in block.shared.items():
                other = before.get(label)
                if other is None or not block.can_share(name, other):
                    raise ValueError(
                        f"block {block.label!r} shares the {name!r} of {label!r:.99}; expected "
                        f"an earlier block that stores one of the same shape and dtype"
                    )
            before[block.label] = block
            shapes = [self.parameters[name] for name in block.parameters]
            if not block.fits(shapes):
                raise ValueError(
                    f"block {block.label!r} has shape {block.shape}, which does not fit parameters "
                    f"of shapes {shapes}; expected as many entries in both"
                )


class OperatorHeader(OperatorLayout, frozen=True, tag_field="format", tag=OPERATOR):
    """The header of an operator's snapshot.

    Attributes:
        library: Name and version of the library that wrote it.
    """

    library: str


class TermLayout(_Object, frozen=True):
    """A term of a penalty without its tensors.

    Attributes:
        weight: The factor of its operator.
        operator: The operator.
    """

    weight: Annotated[float, Meta(ge=0)]
    operator: OperatorLayout


# Of strengths, found from 1e-20 to 1e20, at a learning rate that may be much larger later.
_LARGEST_LOGARITHM: Final = 100.0


_Count = Annotated[int, Meta(ge=0, le=LARGEST_COUNT)]
_Sum = Annotated[float, Meta(ge=-float(LARGEST_COUNT), le=float(LARGEST_COUNT))]
# How many measurements, the sum of their logarithms, how many old tasks there were then, and the
# largest learning rate.
_Looks = tuple[_Count, _Sum, _Count, Annotated[float, Meta(ge=0)]]


class PenaltyHeader(_Object, frozen=True, tag_field="format", tag=PENALTY):
    """The header of a penalty's snapshot.

    Attributes:
        library: Name and version of the library that wrote it.
        options: Arguments of the constructor by name.
        mode: The mode it was learned in.
        weighting: How the tasks were weighted.
        num_tasks: Number of consolidated tasks.
        last_examples: Number of examples of the last one.
        last_loss_terms: Number of its loss terms.
        found_strength: The measurements from which the strength was found, and those from which its
            bound was found in a later task; zeros where there were none.
        strength_limit: What leaves enough of the task in which it was found; 1e20 if any does.
        terms: Its terms.
    """

    library: str
    options: dict[str, Setting]
    mode: str
    weighting: str
    num_tasks: Annotated[int, Meta(ge=0, le=LARGEST_COUNT)]
    last_examples: Annotated[int, Meta(ge=1, le=LARGEST_COUNT)]
    last_loss_terms: Annotated[float, Meta(gt=0, le=float(LARGEST_COUNT))]
    found_strength: tuple[_Looks, _Looks]
    strength_limit: Annotated[float, Meta(gt=0, le=1e21)]
    terms: tuple[TermLayout, ...]

    def __post_init__(self) -> None:
        """Raise `ValueError` unless the terms can be those of one penalty."""
        most = min(self.num_tasks, 1) if self.mode == "merged" else self.num_tasks
        if len(self.terms) > most:
            raise ValueError(
                f"there are {len(self.terms)} terms for {self.num_tasks} tasks in mode "
                f"{self.mode!r:.99}; expected at most {most}"
            )
        first, later = self.found_strength
        if (
            any((looks == 0) != (task == 0) for looks, _, task, _ in (first, later))
            or any(_is_too_large(*measured) for measured in self.found_strength)
            or max(first[2], later[2]) > self.num_tasks
            or 0 < later[2] <= first[2]
        ):
            raise ValueError(
                f"found_strength is {[list(first), list(later)]}, for {self.num_tasks} tasks; "
                f"expected the number of measurements, the sum of their logarithms, the number of "
                f"tasks at that time, and the largest learning rate; then the same four for a "
                f"later task"
            )
        reductions = sorted({term.operator.provenance.reduction for term in self.terms})
        if len(reductions) > 1:
            raise ValueError(f"terms have reductions {reductions}; expected the same for all")


def _is_too_large(looks: int, total: float, _: int, rate: float) -> bool:
    """Return whether measurements have a mean that no measured strengths can have."""
    if not looks:
        return total != 0
    return rate <= 0 or abs(total / looks - math.log(rate)) > _LARGEST_LOGARITHM


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
