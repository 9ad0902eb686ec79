"""Keeping fewer directions of a block, with the exact means over what is not kept."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rotate_ewc._utils.validation import Rank
from rotate_ewc.linalg.block import Block
from rotate_ewc.linalg.kronecker import Basis
from rotate_ewc.linalg.truncation import truncation_of


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


def cut(block: Block, gradient_rank: int | None, activation_rank: int | None) -> Block:
    """Keep the directions of each side that have the largest partial traces.

    The eigenvalues of the others become their mean, together with those of the complement, if there
    is one. Trace, and partial traces in all directions that are kept, stay what they are.

    Args:
        block: The block.
        gradient_rank: How many directions to keep of the side of the output gradients, at least 1;
            None is all. A side without a basis (the identity) is left as it is, and one that has no
            more than these anyway.
        activation_rank: Likewise of the side of the inputs.

    Returns:
        The block in thinner bases, whose columns keep their order; itself if nothing is cut.

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
    """Return a thinner basis and the numbers of its columns, `[groups, rank]`; None if all stay."""
    if basis is None or rank is None or rank >= basis.shape[2]:
        return basis, None
    kept = partial_traces[:, : basis.shape[2]].topk(rank, dim=1).indices.sort(dim=1).values
    columns = kept[:, None, :].expand(-1, basis.shape[1], -1)
    return basis.gather(2, columns), kept


def _averaged(eigenvalues: Tensor, kept: Tensor, rank: int, size: int) -> Tensor:
    """Return the kept rows, and the mean over all other directions of their side.

    Args:
        eigenvalues: `[groups, K, *]`, of which `rank` rows are of one direction each, and the last
            of all others, if there are any.
        kept: Which rows to keep, `[groups, fewer than rank]`.
        rank: How many directions were kept.
        size: How many there are.
    """
    others = torch.ones_like(eigenvalues[:, :, 0])
    others[:, rank:] = size - rank
    others.scatter_(1, kept, 0.0)
    # Added up as what they are, at least 0, and not as a difference, which could be less.
    sums = (others[:, :, None] * eigenvalues).sum(dim=1, keepdim=True)
    least = eigenvalues.masked_fill(others[:, :, None] == 0, torch.inf).amin(dim=1, keepdim=True)
    most = eigenvalues.masked_fill(others[:, :, None] == 0, 0.0).amax(dim=1, keepdim=True)
    # Of equal numbers the mean is that number, to the bit.
    mean = (sums / (size - kept.shape[1])).clamp(least, most)
    rows = kept[:, :, None].expand(-1, -1, eigenvalues.shape[2])
    return torch.cat([eigenvalues.gather(1, rows), mean], dim=1)


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
