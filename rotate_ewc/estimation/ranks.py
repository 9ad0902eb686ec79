"""What `rank` means for one side of a block."""

from __future__ import annotations

from typing import Final

from rotate_ewc._utils.validation import AUTO, FULL, Rank
from rotate_ewc.linalg.truncation import Truncation

# A side of so few directions keeps all of them; a longer one may always keep as many.
_FEW_DIRECTIONS: Final = 16


def truncation_of(rank: Rank, size: int, other: int) -> Truncation | None:
    """Return which eigenvectors of one side's Kronecker factor are kept; None is all.

    Args:
        rank: A number, a part of the trace, `"auto"` or `"full"`.
        size: d, the directions that the side has.
        other: Those of the other side. With `"auto"` a basis has no more entries than the
            parameter, `d × other`, unless it is nearly all of a square one.
    """
    if rank == FULL:
        return None
    if rank == AUTO:
        if size <= _FEW_DIRECTIONS:
            return None
        most = max(_FEW_DIRECTIONS, other)
        return Truncation(size if 2 * most > size else most, all_or_half=True)
    if isinstance(rank, int):
        return Truncation(min(rank, size))
    return Truncation(size, part=float(rank))
