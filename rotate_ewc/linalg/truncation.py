"""Which eigenvectors of a positive semi-definite matrix are kept: the leading ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

# Eigenvalues below so many units in the last place of the largest are rounding errors; in large
# matrices, below the square root of their size.
_LEAST_ROUNDING: Final = 10.0


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
