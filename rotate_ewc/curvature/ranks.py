"""How many directions of a sum of thin blocks are kept."""

from __future__ import annotations

from torch import Tensor

from rotate_ewc._utils.validation import Rank
from rotate_ewc.estimation.ranks import truncation_of
from rotate_ewc.linalg.block import Block


def ranks_of_sum(rank: Rank, block: Block) -> tuple[int | None, int | None]:
    """Return how many directions to keep of each side of a sum; None is all that it has.

    Args:
        rank: What a user has said of its parameter.
        block: The sum, with all directions that any of the summands keeps.
    """
    (_, d_out, d_in), traces = block.shape, block.partial_traces
    return (
        _rank_of_side(rank, d_out, d_in, block.ranks[0], traces[0]),
        _rank_of_side(rank, d_in, d_out, block.ranks[1], traces[1]),
    )


def _rank_of_side(rank: Rank, size: int, other: int, kept: int, traces: Tensor) -> int | None:
    truncation = truncation_of(rank, size, other)
    if truncation is None:
        return None
    if truncation.part is None or truncation.part >= 1.0:
        return truncation.most
    # What does not stand out from the rest is no loss: all eigenvalues may have been damped.
    rest = traces[:, -1:] if kept < size else traces.amin(dim=1, keepdim=True)
    total = traces[:, :kept].sum(dim=1, keepdim=True) + (size - kept) * rest
    excess = (traces[:, :kept] - rest).clamp(min=0.0).sort(dim=1, descending=True).values
    lost = excess.sum(dim=1, keepdim=True) - excess.cumsum(dim=1)
    short = (lost > (1.0 - truncation.part) * total).sum(dim=1)
    return int(short.max()) + 1
