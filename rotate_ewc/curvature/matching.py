"""Which blocks of several operators belong together, and how large their parameters are."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import torch

from rotate_ewc._utils.messages import listed, parameters_have
from rotate_ewc.curvature.operator import EKFACLinearOperator
from rotate_ewc.linalg.block import Block

# Parameters, number of groups, and whether the activation side comes first.
BlockKind = tuple[tuple[str, ...], int, bool]


def matching_blocks(
    operators: Sequence[EKFACLinearOperator],
    weights: Sequence[float],
    zeros: Collection[tuple[int, str]],
) -> list[list[Block]]:
    """Collect the blocks of the same parameters, times the weights of their operators.

    A parameter on which no output depends, such as one of another task's head, has a block of zeros
    of the plainest kind. A block of zeros is left out where another operator's block of the same
    parameter is of another kind.

    Args:
        operators: The operators.
        weights: Their weights.
        zeros: Which blocks are zero, by number of the operator and label.

    Raises:
        ValueError: If blocks of a parameter do not fit together, naming it.
    """
    blocks, nonzero = [], []
    for index, (operator, weight) in enumerate(zip(operators, weights, strict=True)):
        for block in operator.blocks:
            weighted = block.with_eigenvalues(block.eigenvalues * weight)
            blocks.append(weighted)
            if weight and (index, block.label) not in zeros:
                nonzero.append(weighted)
    kinds: dict[str, BlockKind] = {}
    for block in (*nonzero, *blocks):
        for name in block.parameters:
            kinds.setdefault(name, _kind(block))
    _check_kinds(nonzero, kinds)
    groups: dict[tuple[str, ...], list[Block]] = {}
    for block in blocks:
        if all(kinds[name] == _kind(block) for name in block.parameters):
            groups.setdefault(block.parameters, []).append(block)
    for block in blocks:
        for name in block.parameters:
            # The rest of a joint block of zeros, of which another operator has only one part. It
            # grows to the size of its parameter when it is merged.
            if kinds[name][0] not in groups:
                groups[(name,)] = [Block((name,), None, None, block.eigenvalues.new_zeros(1, 0, 0))]
    return list(groups.values())


def common_shapes(
    operators: Iterable[EKFACLinearOperator], matching: Iterable[Sequence[Block]]
) -> dict[str, torch.Size]:
    """Return the largest shape of every parameter; only its first two axes may grow.

    Args:
        operators: The operators.
        matching: What `matching_blocks` returns for them.

    Raises:
        ValueError: If shapes of a parameter do not fit together, naming it.
    """
    firsts = [blocks[0] for blocks in matching]
    groups = {name: len(block.eigenvalues) for block in firsts for name in block.parameters}
    shapes: dict[str, torch.Size] = {}
    refused = []
    for operator in operators:
        for name, shape in operator.parameter_shapes.items():
            known = shapes.setdefault(name, shape)
            if shape == known:
                continue
            if len(shape) != len(known) or shape[2:] != known[2:] or groups[name] > 1:
                refused.append(f"parameter {name!r} has shapes {list(known)} and {list(shape)}")
                continue
            shapes[name] = torch.Size(map(max, known, shape))
    if refused:
        raise ValueError(
            f"{listed(refused)}, which do not fit together; expected shapes that differ only by "
            f"added outputs or inputs, of a layer without groups"
        )
    return shapes


def _kind(block: Block) -> BlockKind:
    return block.parameters, block.eigenvalues.shape[0], block.transposed


def _check_kinds(blocks: Iterable[Block], kinds: Mapping[str, BlockKind]) -> None:
    """Raise if blocks of a parameter that are not zero are of different kinds, naming all."""
    joint: dict[str, None] = {}
    others = {}
    for block in blocks:
        for name in block.parameters:
            if block.parameters != kinds[name][0]:
                joint[name] = None
            elif _kind(block) != kinds[name]:
                others[name] = (
                    f"{kinds[name][1:]} in one operator and {_kind(block)[1:]} in another"
                )
    if joint:
        raise ValueError(
            f"{parameters_have(joint)} a block of its own in one operator and a joint block "
            f"in another; estimate both with the same separate_weight_and_bias"
        )
    if others:
        told = [
            f"parameter {name!r} has blocks that do not fit together: (groups, transposed) is {how}"
            for name, how in others.items()
        ]
        raise ValueError(listed(told))
