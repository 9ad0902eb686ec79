"""What `rank` means for one side of a block."""

from __future__ import annotations

from typing import Final

from rotate_ewc._utils.validation import AUTO, FULL, Rank
from rotate_ewc.linalg.truncation import Truncation

# All directions are kept up to a length with which a basis takes 64 KiB, and where it takes no more
# than some MiB and the other side is not much shorter: with 100 of 784 directions of 784 × 100
# weights, and 16 of the 100 of their biases, half a point to four points of accuracy were lost.
_TINY: Final = 128
_SHORT_VECTOR: Final = 512
_SHORT: Final = 1024
_TIMES_THE_OTHER: Final = 8
# A longer one may always keep so many.
_FEW_DIRECTIONS: Final = 16


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
