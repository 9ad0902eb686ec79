"""Sum operators into one of the same form and size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from msgspec import structs
from torch import Tensor

from rotate_ewc._utils.messages import left_out
from rotate_ewc._utils.numerics import check_trace
from rotate_ewc._utils.out_of_memory import advising
from rotate_ewc._utils.validation import as_non_negative_number
from rotate_ewc.curvature.matching import common_shapes, matching_blocks
from rotate_ewc.curvature.operator import EKFACLinearOperator
from rotate_ewc.distributed.ranks import Ranks
from rotate_ewc.linalg import kronecker
from rotate_ewc.linalg.block import Block, matrix_shape
from rotate_ewc.linalg.kronecker import Basis


def merge(
    operators: Sequence[EKFACLinearOperator], weights: Sequence[float] | None = None
) -> EKFACLinearOperator:
    """Approximate `Σ_t w_t F_t` by one operator, at the memory and cost of one.

    The sum of blocks in different bases is no such block. Its partial traces are known exactly,
    though, and their eigenvectors make the new bases; the new eigenvalues are the exact diagonal of
    the sum in these bases. Trace and both partial traces of the sum are preserved exactly, and the
    result is positive semi-definite. Merging many operators at once is more exact than one by one.

    A parameter that some operators lack, or have with fewer rows or columns, counts as zero there:
    a block acts on the leading slice that existed when it was made. A block of zeros, as a
    parameter has on which no output depended, fits every other.

    Args:
        operators: At least one; parameters with the same name belong together.
        weights: One number of at least 0 for each operator; None is 1 for each.

    Returns:
        An operator over all parameters of all operators.

    Raises:
        ValueError: If shapes or blocks of a parameter do not fit together, or a sum is not finite,
            naming it.
        MemoryError: If there is not enough memory, naming the factor.
        TypeError: If something is not an operator, or a weight not a number.
    """
    return merge_together(operators, weights, Ranks())


def merge_together(
    operators: Sequence[EKFACLinearOperator], weights: Sequence[float] | None, ranks: Ranks
) -> EKFACLinearOperator:
    """Do what `merge` does, in several processes that have the same operators.

    Each block is merged in one of them, the most expensive first, and all get the same bits.
    """
    operators = list(operators)
    if not operators:
        raise ValueError("operators is empty; expected at least one")
    for operator in operators:
        if not isinstance(operator, EKFACLinearOperator):
            raise TypeError(f"operators has {type(operator).__name__}; expected operators")
    checked = [1.0] * len(operators) if weights is None else list(weights)
    if len(checked) != len(operators):
        raise ValueError(f"got {len(checked)} weights; expected {len(operators)}")
    checked = [as_non_negative_number(f"weights[{i}]", w) for i, w in enumerate(checked)]
    groups = matching_blocks(operators, checked)
    shapes = common_shapes(operators, groups)
    blocks = _merged(groups, shapes, ranks)
    num_data = sum(operator.num_data for operator in operators)
    num_loss_terms = sum(operator.provenance.num_loss_terms for operator in operators)
    provenance = structs.replace(
        operators[-1].provenance, num_data=num_data, num_loss_terms=num_loss_terms
    )
    return EKFACLinearOperator.from_blocks(blocks, shapes, provenance)


def _merged(
    groups: Sequence[Sequence[Block]], shapes: Mapping[str, torch.Size], ranks: Ranks
) -> list[Block]:
    """Sum the blocks of each group."""
    costs = [sum(size**3 for size in group[-1].eigenvalues.shape[1:]) for group in groups]
    own = {}
    for index, (group, owner) in enumerate(zip(groups, ranks.owners(costs), strict=True)):
        if owner == ranks.rank:
            names = group[0].parameters
            with advising(left_out(names)):
                own[index] = _merge_blocks(group, shapes[names[0]])
    if ranks.size == 1:
        return list(own.values())
    device = groups[0][0].eigenvalues.device
    tensors = {index: block.tensors for index, block in own.items()}
    found = ranks.share("merged blocks", tensors, device)
    nothing: dict[str, Any] = {"gradient_basis": None, "activation_basis": None}
    # The form is that of every block of the group.
    return [replace(group[0], **(nothing | found[i])) for i, group in enumerate(groups)]


def _merge_blocks(blocks: Sequence[Block], shape: torch.Size) -> Block:
    """Sum blocks of the same parameters.

    Args:
        blocks: The blocks.
        shape: What the (weight) parameter has grown to.
    """
    label, joint = blocks[0].label, len(blocks[0].parameters) > 1
    # No entry of a partial trace, nor of the result, is larger.
    check_trace(torch.stack([block.trace for block in blocks]).sum(), label)
    _, d_out, d_in = matrix_shape(shape, blocks[0].eigenvalues.shape[0], blocks[0].transposed)
    d_in += joint
    if len(blocks) == 1 and blocks[0].eigenvalues.shape[1:] == (d_out, d_in):
        return blocks[0]
    grown = _grown(blocks, d_out, d_in)
    gradient_basis = kronecker.merged_basis(
        [block.gradient_basis for block in grown],
        [block.eigenvalues.sum(dim=2) for block in grown],
        f"merged gradient factor of {label!r}",
    )
    activation_basis = kronecker.merged_basis(
        [block.activation_basis for block in grown],
        [block.eigenvalues.sum(dim=1) for block in grown],
        f"merged activation factor of {label!r}",
    )
    projected = [block.diagonal_in(gradient_basis, activation_basis) for block in grown]
    return replace(
        blocks[0],
        gradient_basis=gradient_basis,
        activation_basis=activation_basis,
        eigenvalues=torch.stack(projected).sum(dim=0),
    )


def _grown(blocks: Sequence[Block], d_out: int, d_in: int) -> list[Block]:
    """Bring blocks to the size of a parameter that has grown; their bases may be rectangular."""
    grown = _grown_along(blocks, "gradient_basis", d_out, axis=1)
    return _grown_along(grown, "activation_basis", d_in, axis=2)


def _grown_along(blocks: Sequence[Block], side: str, size: int, axis: int) -> list[Block]:
    """Bring one side of blocks to the size of a grown parameter.

    A basis is extended by rows of zeros and keeps its rank. Where all are the identity, they stay
    so, and the eigenvalues are extended instead.

    Args:
        blocks: The blocks.
        side: The attribute with the side's basis.
        size: What the side has grown to.
        axis: That of the side in the eigenvalues.
    """
    if all(getattr(block, side) is None for block in blocks):
        return [b.with_eigenvalues(_with_zeros(b.eigenvalues, size, axis)) for b in blocks]
    return [_padded(block, side, size, axis) for block in blocks]


def _with_zeros(tensor: Tensor, size: int, axis: int) -> Tensor:
    """Extend an axis (1 or 2) of `[groups, *, *]` to a size."""
    shape = list(tensor.shape)
    shape[axis] = size - tensor.shape[axis]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=axis)


def _padded(block: Block, side: str, size: int, axis: int) -> Block:
    basis: Basis = getattr(block, side)
    values = block.eigenvalues
    groups, rank = values.shape[0], values.shape[axis]
    if rank == size:
        return block
    if basis is None:
        eye = torch.eye(size, rank, device=values.device, dtype=values.dtype)
        padded = eye.expand(groups, size, rank)
    else:
        padded = _with_zeros(basis, size, axis=1)
    changed: dict[str, Any] = {side: padded}
    return replace(block, **changed)
