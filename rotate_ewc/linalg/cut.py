"""Keep fewer directions of a block, with the exact means over the others."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rotate_ewc._utils.validation import Rank
from rotate_ewc.linalg.block import Block
from rotate_ewc.linalg.kronecker import Basis
from rotate_ewc.linalg.truncation import truncation_of


def ranks_of_sum(rank: Rank, block: Block) -> tuple[int | None, int | None]:
    """Return how many directions of each side of a sum to keep; None keeps all.

    Args:
        rank: The user's setting for its parameter.
        block: The sum, with every direction that one of the summands keeps.
    """
    (_, d_out, d_in), traces = block.shape, block.partial_traces
    return (
        _rank_of_side(rank, d_out, d_in, block.ranks[0], traces[0]),
        _rank_of_side(rank, d_in, d_out, block.ranks[1], traces[1]),
    )


def cut(block: Block, gradient_rank: int | None, activation_rank: int | None) -> Block:
    """Keep the directions of each side that have the largest partial traces.

    The eigenvalues of the other directions, and of the complement if there is one, are replaced by
    their mean. The trace, and the partial traces of all kept directions, do not change.

    Args:
        block: The block.
        gradient_rank: How many directions to keep on the side of the output gradients, at least 1;
            None keeps all. A side that has no basis (the identity), or no more directions than
            this, does not change.
        activation_rank: The same for the side of the inputs.

    Returns:
        The block in thinner bases, with the columns in the same order; if nothing is cut, the same
        object.

    Raises:
        ValueError: If a rank is less than 1.
    """
    for name, rank in (("gradient_rank", gradient_rank), ("activation_rank", activation_rank)):
        if rank is not None and rank < 1:
            raise ValueError(f"{name} is {rank}; expected at least 1, or None for all directions")
    of_outputs, of_inputs = block.partial_traces
    _, d_out, d_in = block.shape
    eigenvalues = block.eigenvalues
    gradient_basis, kept = _kept(block.gradient_basis, of_outputs, gradient_rank)
    if kept is not None:
        eigenvalues = _averaged(eigenvalues, kept, block.ranks[0], d_out)
    activation_basis, kept = _kept(block.activation_basis, of_inputs, activation_rank)
    if kept is not None:
        eigenvalues = _averaged(eigenvalues.mT, kept, block.ranks[1], d_in).mT.contiguous()
    if eigenvalues is block.eigenvalues:
        return block
    return replace(
        block,
        gradient_basis=gradient_basis,
        activation_basis=activation_basis,
        eigenvalues=eigenvalues,
    )


def _kept(basis: Basis, partial_traces: Tensor, rank: int | None) -> tuple[Basis, Tensor | None]:
    """Return a thinner basis and its columns' indices, `[groups, rank]`; None if all are kept."""
    if basis is None or rank is None or rank >= basis.shape[2]:
        return basis, None
    kept = partial_traces[:, : basis.shape[2]].topk(rank, dim=1).indices.sort(dim=1).values
    columns = kept[:, None, :].expand(-1, basis.shape[1], -1)
    return basis.gather(2, columns), kept


def _averaged(eigenvalues: Tensor, kept: Tensor, rank: int, size: int) -> Tensor:
    """Return the kept rows, and after them the mean over all other directions of the side.

    Args:
        eigenvalues: `[groups, K, *]`: `rank` rows for one direction each, and then one row for all
            others, if there are any.
        kept: Which rows to keep, `[groups, fewer than rank]`.
        rank: How many directions have a row of their own.
        size: How many directions there are.
    """
    others = torch.ones_like(eigenvalues[:, :, 0])
    others[:, rank:] = size - rank
    others.scatter_(1, kept, 0.0)
    # A sum of numbers that are at least 0; a difference could be negative by rounding.
    sums = (others[:, :, None] * eigenvalues).sum(dim=1, keepdim=True)
    least = eigenvalues.masked_fill(others[:, :, None] == 0, torch.inf).amin(dim=1, keepdim=True)
    most = eigenvalues.masked_fill(others[:, :, None] == 0, 0.0).amax(dim=1, keepdim=True)
    # The mean of equal numbers is exactly that number.
    mean = (sums / (size - kept.shape[1])).clamp(least, most)
    rows = kept[:, :, None].expand(-1, -1, eigenvalues.shape[2])
    return torch.cat([eigenvalues.gather(1, rows), mean], dim=1)


def _rank_of_side(rank: Rank, size: int, other: int, kept: int, traces: Tensor) -> int | None:
    truncation = truncation_of(rank, size, other)
    if truncation is None:
        return None
    if truncation.part is None or truncation.part >= 1.0:
        return truncation.most
    # Only what exceeds the rest counts as lost, because all eigenvalues may have been damped.
    rest = traces[:, -1:] if kept < size else traces.amin(dim=1, keepdim=True)
    total = traces[:, :kept].sum(dim=1, keepdim=True) + (size - kept) * rest
    excess = (traces[:, :kept] - rest).clamp(min=0.0).sort(dim=1, descending=True).values
    lost = excess.sum(dim=1, keepdim=True) - excess.cumsum(dim=1)
    short = (lost > (1.0 - truncation.part) * total).sum(dim=1)
    return int(short.max()) + 1
