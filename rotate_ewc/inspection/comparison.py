"""How the blocks of two operators differ."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rotate_ewc.curvature.operator import EKFACLinearOperator
from rotate_ewc.inspection.summary import effective_rank, relative
from rotate_ewc.linalg import kronecker
from rotate_ewc.linalg.block import Block


@dataclass(frozen=True)
class BlockComparison:
    """How two operators' blocks of the same parameters differ.

    Attributes:
        label: The blocks' name.
        trace_ratio: The second's trace over the first's.
        cosine: `tr(F₁F₂) / (‖F₁‖ ‖F₂‖)`, 1 if they are proportional.
        dimension: k, the number of leading eigenvectors that are compared: the first block's
            effective rank, rounded.
        overlap: `tr(P₁P₂) / k` of the projections on the k leading eigenvectors of each: 1 if they
            span the same space, k over the number of parameters if they are unrelated.
    """

    label: str
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
    return (block.eigenvalues.shape, block.transposed) == (
        other.eigenvalues.shape,
        other.transposed,
    )


def _lacking(operator: EKFACLinearOperator, other: EKFACLinearOperator) -> tuple[str, ...]:
    names = other.parameter_shapes
    return tuple(b.label for b in operator.blocks if not any(n in names for n in b.parameters))


def _compare(first: Block, second: Block) -> BlockComparison:
    a, b = (block.map(lambda tensor: tensor.double()) for block in (first, second))
    gradient_change = kronecker.change_basis(b.gradient_basis, a.gradient_basis)
    activation_change = kronecker.change_basis(b.activation_basis, a.activation_basis)

    def inner_product(of_first: Tensor, of_second: Tensor) -> float:
        """`tr(F₁F₂)` of matrices with these eigenvalues in the blocks' bases."""
        seen_in_first = kronecker.project_eigenvalues(gradient_change, activation_change, of_second)
        return (of_first * seen_in_first).sum().item()

    values = [relative(block.eigenvalues) for block in (a, b)]
    norms = [torch.linalg.vector_norm(v).item() for v in values]
    dimension = round(effective_rank(values[0]))
    leading = [_leading(v, dimension) for v in values]
    product, traces = norms[0] * norms[1], [block.trace.item() for block in (a, b)]
    nan = float("nan")
    return BlockComparison(
        label=first.label,
        trace_ratio=traces[1] / traces[0] if traces[0] > 0 else nan,
        cosine=inner_product(*values) / product if product > 0 else nan,
        dimension=dimension,
        overlap=inner_product(*leading) / dimension if dimension and product > 0 else nan,
    )


def _leading(values: Tensor, count: int) -> Tensor:
    """Return ones where the largest eigenvalues are, and zeros elsewhere."""
    chosen = values.flatten().topk(count).indices
    return torch.zeros_like(values.flatten()).index_fill_(0, chosen, 1.0).view_as(values)
