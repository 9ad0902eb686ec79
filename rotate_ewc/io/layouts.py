"""What a snapshot's header says of its blocks, read without trust in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Final

import torch

from rotate_ewc.errors import SnapshotError
from rotate_ewc.io.storage_dtype import DTYPES

BASES: Final = ("gradient_basis", "activation_basis")

_MOST_NAMED: Final = 10
_LARGEST_SIZE: Final = 2**48
# Tensors have no more; the product of a million sizes would take minutes.
_MOST_AXES: Final = 64


@dataclass(frozen=True)
class Layout:
    """One block as the header describes it.

    Attributes:
        parameters: Its parameters.
        transposed: Whether the input side comes first in the (weight) parameter.
        shape: `(groups, d_out, d_in)`.
        dtype: Of its tensors, whatever they are stored in.
        bases: The sides that have a basis.
    """

    parameters: tuple[str, ...]
    transposed: bool
    shape: tuple[int, int, int]
    dtype: torch.dtype
    bases: tuple[str, ...]

    @property
    def label(self) -> str:
        """The block's name."""
        return "+".join(self.parameters)

    @property
    def attributes(self) -> tuple[str, ...]:
        """The names of its tensors."""
        return ("eigenvalues", *self.bases)

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of its tensors in the snapshot."""
        return tuple(f"{self.label}/{name}" for name in self.attributes)

    def shape_of(self, attribute: str) -> tuple[int, int, int]:
        """Return the shape of one of its tensors."""
        groups, d_out, d_in = self.shape
        sides = {"gradient_basis": d_out, "activation_basis": d_in}
        return (groups, sides[attribute], sides[attribute]) if attribute in sides else self.shape


def read_layouts(
    description: Mapping[str, Any],
) -> tuple[list[Layout], dict[str, torch.Size]]:
    """Read and check what a header says of an operator's blocks and parameters.

    Returns:
        The blocks, which hold each parameter once; and the parameters' shapes.

    Raises:
        SnapshotError: If anything is missing, or does not fit together.
    """
    shapes = _parameter_shapes(description.get("parameters"))
    described = description.get("blocks")
    if not isinstance(described, list) or not described:
        raise SnapshotError(f"snapshot's 'blocks' is {described!r:.99}; expected a list of blocks")
    layouts = [_read(layout, shapes) for layout in described]
    named = sorted(name for layout in layouts for name in layout.parameters)
    if named != sorted(shapes):
        raise SnapshotError(
            f"snapshot's blocks are for parameters {named[:_MOST_NAMED]}; expected each of "
            f"{sorted(shapes)[:_MOST_NAMED]} once"
        )
    if len({layout.label for layout in layouts}) < len(layouts):
        raise SnapshotError("snapshot has two blocks with the same label; expected different ones")
    return layouts, {name: torch.Size(shape) for name, shape in shapes.items()}


def _parameter_shapes(value: object) -> dict[str, list[int]]:
    if not isinstance(value, dict) or not value:
        raise SnapshotError(
            f"snapshot's 'parameters' is {value!r:.99}; expected shapes by parameter name"
        )
    return {name: _sizes(shape, f"shape of parameter {name!r}") for name, shape in value.items()}


def _sizes(value: object, what: str) -> list[int]:
    if (
        not isinstance(value, list)
        or len(value) > _MOST_AXES
        or not all(type(size) is int and 0 <= size < _LARGEST_SIZE for size in value)
    ):
        raise SnapshotError(f"snapshot's {what} is {value!r:.99}; expected a list of sizes")
    return value


def _read(described: object, shapes: Mapping[str, Sequence[int]]) -> Layout:
    if not isinstance(described, dict):
        raise SnapshotError(f"snapshot has the block {described!r:.99}; expected a dictionary")
    names = described.get("parameters")
    if (
        not isinstance(names, list)
        or len(names) not in (1, 2)
        or any(not isinstance(name, str) or name not in shapes for name in names)
    ):
        raise SnapshotError(
            f"snapshot has a block for parameters {names!r:.99}; expected one or two of "
            f"{list(shapes)[:_MOST_NAMED]}"
        )
    what = f"block {'+'.join(names)!r}"
    transposed, bases = described.get("transposed"), described.get("bases")
    if not isinstance(transposed, bool):
        raise SnapshotError(
            f"snapshot's {what} has 'transposed' {transposed!r:.99}; expected true or false"
        )
    if not isinstance(bases, list) or bases != [name for name in BASES if name in bases]:
        raise SnapshotError(
            f"snapshot's {what} has 'bases' {bases!r:.99}; expected some of {BASES}"
        )
    dtype = DTYPES.get(str(described.get("dtype")))
    if dtype is None:
        raise SnapshotError(
            f"snapshot's {what} has 'dtype' {described.get('dtype')!r:.99}; expected one of "
            f"{', '.join(DTYPES)}"
        )
    shape = _sizes(described.get("shape"), f"'shape' of {what}")
    if len(shape) != 3 or not _fit(shape, [shapes[name] for name in names]):
        raise SnapshotError(
            f"snapshot's {what} has shape {shape}, which does not fit parameters of shapes "
            f"{[list(shapes[name]) for name in names]}"
        )
    groups, d_out, d_in = shape
    return Layout(tuple(names), transposed, (groups, d_out, d_in), dtype, tuple(bases))


def _fit(shape: Sequence[int], parameters: Sequence[Sequence[int]]) -> bool:
    """Whether a block has as many entries as its weight, and its bias if that is in it."""
    groups, d_out, d_in = shape
    weight = groups * d_out * (d_in - (len(parameters) - 1))
    return [prod(sizes) for sizes in parameters] == [weight, groups * d_out][: len(parameters)]
