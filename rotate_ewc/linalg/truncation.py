"""Which eigenvectors of a positive semi-definite matrix are kept; what `rank` means for a side."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from rotate_ewc._utils.validation import AUTO, FULL, Rank

# Eigenvalues below so many units in the last place of the largest are rounding errors; in large
# matrices, below the square root of their size.
_LEAST_ROUNDING: Final = 10.0
# All directions are kept up to a length with which a basis takes 64 KiB, and where it takes no more
# than some MiB and the other side is not much shorter: with 100 of 784 directions of 784 × 100
# weights, and 16 of the 100 of their biases, half a point to four points of accuracy were lost.
_TINY: Final = 128
_SHORT_VECTOR: Final = 512
_SHORT: Final = 1024
_TIMES_THE_OTHER: Final = 8
# A longer one may always keep so many.
_FEW_DIRECTIONS: Final = 16


@dataclass(frozen=True)
class Truncation:
    """How many eigenvectors are kept.

    Whatever is numerically zero counts nothing.

    Attributes:
        most: Not more than these.
        part: Not more than make up this part of the trace; None is no matter.
        all_or_half: Whether all are kept where otherwise more than half of them would be.
    """

    most: int
    part: float | None = None
    all_or_half: bool = False

    def count(self, eigenvalues: Tensor, trace: Tensor, size: int) -> int:
        """Return how many eigenvectors are kept, the same number for all groups.

        Args:
            eigenvalues: The largest ones, or all, `[groups, n]` in ascending order.
            trace: The sum of all, `[groups]`.
            size: How many there are.
        """
        largest = eigenvalues[:, -1:].clamp(min=0.0)
        units = max(_LEAST_ROUNDING, math.sqrt(size))
        significant = eigenvalues > largest * units * torch.finfo(eigenvalues.dtype).eps
        count = min(self.most, int(significant.sum(dim=1).max()))
        if self.part is not None and self.part < 1.0:
            sums = eigenvalues.flip(1).cumsum(dim=1)
            short = (sums < self.part * trace[:, None]).sum(dim=1)
            count = min(count, int(short.max()) + 1)
        if self.all_or_half and 2 * count > size:
            return size
        return max(1, count)


def truncation_of(rank: Rank, size: int, other: int) -> Truncation | None:
    """Return which eigenvectors of one side's Kronecker factor are kept; None is all.

    Args:
        rank: A number, a part of the trace, `"auto"` or `"full"`.
        size: d, the directions that the side has.
        other: Those of the other side. With `"auto"` a basis has no more entries than the
            parameter, `d × other`, unless it is nearly all of a square one, or the side is short.
    """
    if rank == FULL:
        return None
    if rank == AUTO:
        of_weight = max(_TINY, min(_SHORT, _TIMES_THE_OTHER * other))
        if size <= (_SHORT_VECTOR if other == 1 else of_weight):
            return None
        most = max(_FEW_DIRECTIONS, other)
        return Truncation(size if 2 * most > size else most, all_or_half=True)
    if isinstance(rank, int):
        return Truncation(min(rank, size))
    return Truncation(size, part=float(rank))
