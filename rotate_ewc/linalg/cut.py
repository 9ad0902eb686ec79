"""Keeping fewer directions of a block, with the exact means over what is not kept."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rotate_ewc.linalg.block import Block
from rotate_ewc.linalg.kronecker import Basis


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
    rows = kept[:, :, None].expand(-1, -1, eigenvalues.shape[2])
    return torch.cat([eigenvalues.gather(1, rows), sums / (size - kept.shape[1])], dim=1)
