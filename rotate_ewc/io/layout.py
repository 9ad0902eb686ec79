"""The schema of snapshots: what a header holds, and what of it has to fit together.

Each class is an object in JSON. `msgspec` checks the names, types and ranges of all fields while it
parses, and each `__post_init__` checks what concerns several of them.

The number in a format is its version. All kinds of snapshots have the same.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from math import prod
from typing import Annotated, Final

import msgspec
import torch
from msgspec import Meta, Struct

from rotate_ewc.provenance import LARGEST_COUNT, Provenance, Setting

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
