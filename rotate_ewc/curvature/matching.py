"""Which blocks of several operators belong together, and how large their parameters are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from rotate_ewc.curvature.operator import EKFACLinearOperator
from rotate_ewc.linalg.block import Block

# Parameters, number of groups, and whether the activation side comes first.
BlockKind = tuple[tuple[str, ...], int, bool]


def matching_blocks(
    operators: Sequence[EKFACLinearOperator], weights: Sequence[float]
) -> list[list[Block]]:
    """Collect the blocks of the same parameters, times the weights of their operators.

    A parameter on which no output depends, such as one of another task's head, has a block of zeros
    of the plainest kind. A block of zeros is left out where another operator's block of the same
    parameter is of another kind.

    Raises:
        ValueError: If blocks of a parameter do not fit together, naming it.
    """
    blocks = [
        block.with_eigenvalues(block.eigenvalues * weight)
        for operator, weight in zip(operators, weights, strict=True)
        for block in operator.blocks
    ]
    nonzero = [block for block in blocks if bool(block.eigenvalues.any())]
    kinds: dict[str, BlockKind] = {}
    for block in (*nonzero, *blocks):
        for name in block.parameters:
            kinds.setdefault(name, _kind(block))
    for block in nonzero:
        for name in block.parameters:
            if kinds[name] != _kind(block):
                _refuse(block, name, kinds[name])
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
    for operator in operators:
        for name, shape in operator.parameter_shapes.items():
            known = shapes.setdefault(name, shape)
            if shape == known:
                continue
            if len(shape) != len(known) or shape[2:] != known[2:] or groups[name] > 1:
                raise ValueError(
                    f"parameter {name!r} has shapes {list(known)} and {list(shape)}, which do not "
                    f"fit together; only more outputs or inputs of a layer without groups can be "
                    f"merged"
                )
            shapes[name] = torch.Size(map(max, known, shape))
    return shapes


def _kind(block: Block) -> BlockKind:
    return block.parameters, block.eigenvalues.shape[0], block.transposed


def _refuse(block: Block, name: str, other: BlockKind) -> None:
    """Raise for two blocks of a parameter that are not zero and of different kinds."""
    if block.parameters != other[0]:
        raise ValueError(
            f"parameter {name!r} has a block of its own in one operator and a joint block in "
            f"another; estimate both with the same separate_weight_and_bias"
        )
    raise ValueError(
        f"parameter {name!r} has blocks that do not fit together: (groups, transposed) is "
        f"{other[1:]} in one operator and {_kind(block)[1:]} in another"
    )
