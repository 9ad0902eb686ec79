"""Figures that summarise the eigenvalues of a block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rotate_ewc.curvature.operator import EKFACLinearOperator
from rotate_ewc.linalg.block import Block


@dataclass(frozen=True)
class BlockSummary:
    """Figures that summarise the eigenvalues of a block.

    Attributes:
        label: The block's name.
        shapes: The shapes of its parameters.
        form: `(groups, d_out, d_in)`.
        kept: How many directions are kept of each side, `(k_out, k_in)`.
        trace: Sum of the eigenvalues.
        largest: The largest eigenvalue.
        rank: Number of eigenvalues above the rounding error of the largest.
        effective_rank: `(Σλ)² / Σλ²`: how many equal eigenvalues would be spread like these.
        condition: The largest eigenvalue over the smallest of those that `rank` counts.
        nbytes: Bytes of its tensors in memory.
    """

    label: str
    shapes: tuple[tuple[int, ...], ...]
    form: tuple[int, ...]
    kept: tuple[int, int]
    trace: float
    largest: float
    rank: int
    effective_rank: float
    condition: float
    nbytes: int


def summaries(operator: EKFACLinearOperator) -> list[BlockSummary]:
    """Summarise every block of an operator."""
    shapes = operator.parameter_shapes
    return [
        _summary(block, tuple(tuple(shapes[name]) for name in block.parameters))
        for block in operator.blocks
    ]


def spectrum(block: Block) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues of a block in descending order, float64, and how often each is one."""
    values = block.eigenvalues.detach().double()
    rows, columns = (counts.double() for counts in block.multiplicities)
    values, order = values.flatten().sort(descending=True)
    counts = (rows[:, None] * columns).expand_as(block.eigenvalues).flatten()
    return values, counts[order]


def relative(values: Tensor) -> Tensor:
    """Divide eigenvalues by the largest, so that their squares neither overflow nor vanish."""
    largest = values.max() if values.numel() else values.sum()
    return values / largest if largest > 0 else values


def effective_rank(values: Tensor, counts: Tensor) -> float:
    """Return `(Σλ)² / Σλ²` of relative eigenvalues; 0 where all are zero."""
    squares = (counts * values.square()).sum()
    return ((counts * values).sum() ** 2 / squares).item() if squares > 0 else 0.0


def _summary(block: Block, shapes: tuple[tuple[int, ...], ...]) -> BlockSummary:
    values, counts = spectrum(block)
    largest = values[0].item() if len(values) else 0.0
    threshold = largest * torch.finfo(block.eigenvalues.dtype).eps
    counted = values > threshold
    return BlockSummary(
        label=block.label,
        shapes=shapes,
        form=block.shape,
        kept=block.ranks,
        trace=(counts * values).sum().item(),
        largest=largest,
        rank=int(counts[counted].sum()),
        effective_rank=effective_rank(relative(values), counts),
        condition=(largest / values[counted][-1]).item() if bool(counted.any()) else float("nan"),
        nbytes=sum(tensor.nbytes for tensor in block.tensors.values()),
    )
