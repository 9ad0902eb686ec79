"""Sum operators into one of the same form and size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
from msgspec import structs
from torch import Tensor

from rotate_ewc._utils.messages import left_out
from rotate_ewc._utils.numerics import check_trace
from rotate_ewc._utils.out_of_memory import advising
from rotate_ewc._utils.validation import Rank, as_non_negative_number
from rotate_ewc.curvature.matching import common_shapes, matching_blocks
from rotate_ewc.curvature.operator import EKFACLinearOperator
from rotate_ewc.curvature.sides import Side, merged_basis, merged_rank
from rotate_ewc.distributed.processes import Ranks
from rotate_ewc.linalg import kronecker
from rotate_ewc.linalg.block import Block, matrix_shape
from rotate_ewc.linalg.cut import cut, ranks_of_sum
from rotate_ewc.linalg.kronecker import Basis
from rotate_ewc.linalg.storage import common_storage_dtype, stored_in
from rotate_ewc.options import EstimationSettings


def merge(
    operators: Sequence[EKFACLinearOperator],
    weights: Sequence[float] | None = None,
    *,
    rank: Rank | Mapping[str, Rank] | None = None,
) -> EKFACLinearOperator:
    """Approximate `Σ_t w_t F_t` by one operator, at the memory and cost of one.

    The sum of blocks in different bases is not such a block. But its partial traces are known
    exactly; their eigenvectors are the new bases, and the new eigenvalues are the exact diagonal of
    the sum in these bases. Trace and both partial traces of the sum are preserved exactly, and the
    result is positive semi-definite. Merging many operators at once is more exact than one by one.

    A parameter that some operators lack, or have with fewer rows or columns, counts as zero there:
    a block acts on the leading slice that existed when it was made. A block of zeros, which a
    parameter gets if no output depended on it, is compatible with every other.

    Thin blocks are merged exactly in the span of all their bases. Then the directions with the
    largest partial traces are kept, and the exact means over the others.

    Args:
        operators: At least one; parameters with the same name belong together.
        weights: One number of at least 0 for each operator; None is 1 for each.
        rank: How many directions of each side to keep, as in `EstimationSettings`. Of a share of
            the trace, only the excess over the mean of the others counts. None keeps as many as the
            operator with the most, and all if an operator that is not zero keeps all.

    Returns:
        An operator over all parameters of all operators.

    Raises:
        ValueError: If shapes or blocks of a parameter do not fit together, or a sum is not finite,
            naming it.
        MemoryError: If there is not enough memory, naming the factor.
        TypeError: If something is not an operator, or a weight not a number.
    """
    return merge_together(operators, weights, rank, Ranks())


def merge_together(
    operators: Sequence[EKFACLinearOperator],
    weights: Sequence[float] | None,
    rank: Rank | Mapping[str, Rank] | None,
    ranks: Ranks,
    owner_of: Callable[[Block], int] | None = None,
) -> EKFACLinearOperator:
    """Do what `merge` does, in several processes that have the same operators.

    Each block is merged in one of them, the most expensive first, and all get the same bits.

    Args:
        operators: As `merge` takes them.
        weights: As `merge` takes them.
        rank: As `merge` takes it.
        ranks: The processes.
        owner_of: The rank of the process that keeps a block. It merges the block and keeps the
            result; in the others, which need not have it, the result consists of meta tensors. None
            gives all of them the result.
    """
    if isinstance(operators, EKFACLinearOperator):
        raise TypeError("operators is one operator; expected a list of them: merge([a, b])")
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
    settings = None if rank is None else EstimationSettings(rank=rank)
    zeros = _zeros(operators, lambda block: owner_of is None or owner_of(block) == ranks.rank)
    if owner_of is not None:
        zeros = set().union(*ranks.gather("blocks of zeros", zeros))
    groups = matching_blocks(operators, checked, zeros)
    shapes = common_shapes(operators, groups)
    merged = _merged(groups, shapes, settings, ranks, owner_of)
    # Bases are stored as before; where operators differ in that, as the most precise one has them.
    pairs = zip(merged, map(common_storage_dtype, groups), strict=True)
    blocks = [stored_in([block], dtype)[0] for block, dtype in pairs]
    num_data = sum(operator.num_data for operator in operators)
    num_loss_terms = sum(operator.provenance.num_loss_terms for operator in operators)
    provenance = structs.replace(
        operators[-1].provenance, num_data=num_data, num_loss_terms=num_loss_terms
    )
    return EKFACLinearOperator.from_blocks(blocks, shapes, provenance)


def _zeros(
    operators: Sequence[EKFACLinearOperator], is_kept: Callable[[Block], bool]
) -> set[tuple[int, str]]:
    """Return which of this process's blocks are zero, by number of the operator and label."""
    return {
        (index, block.label)
        for index, operator in enumerate(operators)
        for block in operator.blocks
        if is_kept(block) and not bool(block.eigenvalues.any())
    }


def _merged(
    groups: Sequence[Sequence[Block]],
    shapes: Mapping[str, torch.Size],
    settings: EstimationSettings | None,
    ranks: Ranks,
    owner_of: Callable[[Block], int] | None,
) -> list[Block]:
    """Sum the blocks of each group."""
    if owner_of is None:
        owners = ranks.owners([sum(size**3 for size in group[-1].shape[1:]) for group in groups])
    else:
        owners = [owner_of(group[0]) for group in groups]
    own = {}
    for index, (group, owner) in enumerate(zip(groups, owners, strict=True)):
        if owner == ranks.rank:
            names = group[0].parameters
            with advising(left_out(names)):
                kept = None if settings is None else settings.rank_of(names[0])
                own[index] = _merge_blocks(group, shapes[names[0]], kept)
    if ranks.size == 1:
        return list(own.values())
    tensors = {index: block.tensors for index, block in own.items()}
    if owner_of is None:
        found = ranks.share("merged blocks", tensors, groups[0][0].eigenvalues.device)
    else:
        found = ranks.outline("merged blocks", tensors)
    nothing: dict[str, Any] = {"gradient_basis": None, "activation_basis": None}
    # The form is that of every block of the group.
    return [replace(group[0], **(nothing | found[i])) for i, group in enumerate(groups)]


def _merge_blocks(blocks: Sequence[Block], shape: torch.Size, rank: Rank | None) -> Block:
    """Sum blocks of the same parameters.

    Args:
        blocks: The blocks.
        shape: What the (weight) parameter has grown to.
        rank: How many directions to keep.
    """
    label, joint = blocks[0].label, len(blocks[0].parameters) > 1
    # No entry of a partial trace, nor of the result, is larger.
    check_trace(torch.stack([block.trace for block in blocks]).sum(), label)
    _, d_out, d_in = matrix_shape(shape, blocks[0].shape[0], blocks[0].transposed)
    d_in += joint
    if len(blocks) == 1 and blocks[0].shape[1:] == (d_out, d_in):
        return blocks[0] if rank is None else cut(blocks[0], *ranks_of_sum(rank, blocks[0]))
    blocks = [block.restored for block in blocks]
    if all(block.gradient_basis is None for block in blocks):
        blocks = [b.with_eigenvalues(_with_zeros(b.eigenvalues, d_out, axis=1)) for b in blocks]
    if all(block.activation_basis is None for block in blocks):
        blocks = [b.with_eigenvalues(_with_zeros(b.eigenvalues, d_in, axis=2)) for b in blocks]
    outputs, inputs = [], []
    for block in blocks:
        (_, *sizes), weights = block.shape, block.partial_traces
        outputs.append(_side(block.gradient_basis, sizes[0], weights[0], d_out))
        inputs.append(_side(block.activation_basis, sizes[1], weights[1], d_in))
    gradient_basis = merged_basis(outputs, d_out, f"merged gradient factor of {label!r}")
    activation_basis = merged_basis(inputs, d_in, f"merged activation factor of {label!r}")
    projected = []
    for block, of_outputs, of_inputs in zip(blocks, outputs, inputs, strict=True):
        found = kronecker.project_eigenvalues(
            of_outputs.overlaps(gradient_basis, d_out),
            of_inputs.overlaps(activation_basis, d_in),
            block.eigenvalues,
        )
        if activation_basis is None:
            found = _averages(found, block.eigenvalues, block.shape[1] < d_out)
        projected.append(found)
    merged = replace(
        blocks[0],
        gradient_basis=gradient_basis,
        activation_basis=activation_basis,
        # One after the other, so that all entries are rounded alike.
        eigenvalues=reduce(torch.add, projected),
    )
    if rank is None:
        return cut(merged, merged_rank(outputs), merged_rank(inputs))
    return cut(merged, *ranks_of_sum(rank, merged))


def _averages(projected: Tensor, eigenvalues: Tensor, has_grown: bool) -> Tensor:
    """Bring what are averages over directions of outputs to where these can be, but for rounding.

    Inputs with only one eigenvalue, such as words that no example had, keep it to the bit.
    """
    least = None if has_grown else eigenvalues.amin(dim=1, keepdim=True)
    return projected.clamp(least, eigenvalues.amax(dim=1, keepdim=True))


def _side(basis: Basis, size: int, weights: Tensor, new_size: int) -> Side:
    """Return one side of a block, brought to the size of a parameter that has grown."""
    if size == new_size:
        return Side(basis, size, weights)
    if basis is None:
        eye = torch.eye(new_size, size, device=weights.device, dtype=weights.dtype)
        return Side(eye.expand(len(weights), new_size, size), size, weights)
    return Side(_with_zeros(basis, new_size, axis=1), size, weights)


def _with_zeros(tensor: Tensor, size: int, axis: int) -> Tensor:
    """Extend an axis (1 or 2) of `[groups, *, *]` to a size."""
    shape = list(tensor.shape)
    shape[axis] = size - tensor.shape[axis]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=axis)
