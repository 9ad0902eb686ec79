"""How the blocks of two operators differ."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rotate_ewc.curvature.operator import EKFACLinearOperator
from rotate_ewc.inspection.summary import effective_rank, relative, spectrum
from rotate_ewc.linalg.block import Block


@dataclass(frozen=True)
class BlockComparison:
    """How two operators' blocks of the same parameters differ.

    Attributes:
        label: The blocks' name.
        form: `(groups, d_out, d_in)`.
        kept: How many directions of each side are kept, of the first and of the second.
        trace_ratio: The second's trace over the first's.
        cosine: `tr(F₁F₂) / (‖F₁‖ ‖F₂‖)`, 1 if they are proportional.
        dimension: k, the number of leading eigenvectors that are compared: the first block's
            effective rank, rounded.
        overlap: `tr(P₁P₂) / k` of the projections on the k leading eigenvectors of each: 1 if they
            span the same space, k over the number of parameters if they are unrelated.
    """

    label: str
    form: tuple[int, int, int]
    kept: tuple[tuple[int, int], tuple[int, int]]
    trace_ratio: float
    cosine: float
    dimension: int
    overlap: float


@dataclass(frozen=True)
class Comparison:
    """How two operators differ.

    Attributes:
        blocks: Blocks of the same parameters and form.
        different: Labels of blocks whose parameters the second has in blocks of another form.
        only_first: Labels of blocks whose parameters the second lacks.
        only_second: Labels of blocks whose parameters the first lacks.
    """

    blocks: tuple[BlockComparison, ...]
    different: tuple[str, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]


def compare(first: EKFACLinearOperator, second: EKFACLinearOperator) -> Comparison:
    """Compare two operators block by block."""
    others = {block.label: block for block in second.blocks}
    compared, different = [], []
    for block in first.blocks:
        other = others.get(block.label)
        if other is not None and _alike(block, other):
            compared.append(_compare(block, other))
        elif any(name in second.parameter_shapes for name in block.parameters):
            different.append(block.label)
    return Comparison(
        tuple(compared),
        tuple(different),
        _lacking(first, second),
        _lacking(second, first),
    )


def _alike(block: Block, other: Block) -> bool:
    return (block.shape, block.transposed) == (other.shape, other.transposed)


def _lacking(operator: EKFACLinearOperator, other: EKFACLinearOperator) -> tuple[str, ...]:
    names = other.parameter_shapes
    return tuple(b.label for b in operator.blocks if not any(n in names for n in b.parameters))


def _compare(first: Block, second: Block) -> BlockComparison:
    a, b = (block.restored.map(lambda tensor: tensor.double()) for block in (first, second))

    def inner_product(first_values: Tensor, second_values: Tensor) -> float:
        """`tr(F₁F₂)` of matrices with these eigenvalues in the blocks' bases."""
        second = b.with_eigenvalues(second_values)
        seen_in_first = second.diagonal_in(a.gradient_basis, a.activation_basis)
        return a.total(first_values * seen_in_first).item()

    values = [relative(block.eigenvalues) for block in (a, b)]
    norms = [block.total(v.square()).sqrt().item() for block, v in zip((a, b), values, strict=True)]
    of_first, counts = spectrum(a)
    dimension = round(effective_rank(relative(of_first), counts))
    leading = [_leading(block, dimension) for block in (a, b)]
    product, traces = norms[0] * norms[1], [block.trace.item() for block in (a, b)]
    nan = float("nan")
    return BlockComparison(
        label=first.label,
        form=first.shape,
        kept=(first.ranks, second.ranks),
        trace_ratio=traces[1] / traces[0] if traces[0] > 0 else nan,
        cosine=inner_product(*values) / product if product > 0 else nan,
        dimension=dimension,
        overlap=inner_product(*leading) / dimension if dimension and product > 0 else nan,
    )


def _leading(block: Block, count: int) -> Tensor:
    """Return ones where the largest eigenvalues are, and zeros elsewhere.

    Where some of the directions of one eigenvalue are wanted, each is so in part.
    """
    values = block.eigenvalues
    rows, columns = block.multiplicities
    order = values.flatten().argsort(descending=True)
    counts = (rows[:, None] * columns).expand_as(values).flatten()[order]
    before = counts.cumsum(0) - counts
    parts = ((count - before) / counts).clamp(0.0, 1.0)
    return torch.zeros_like(parts).scatter_(0, order, parts).view_as(values)
