"""Which blocks of several operators belong together, and how large their parameters are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from rotate_ewc.curvature.operator import EKFACLinearOperator
from rotate_ewc.linalg.block import Block

# Parameters, number of groups, and whether the input side comes first.
Form = tuple[tuple[str, ...], int, bool]


def matching_blocks(
    operators: Sequence[EKFACLinearOperator], weights: Sequence[float]
) -> list[list[Block]]:
    """Collect the blocks of the same parameters, times the weights of their operators.

    A parameter that no output depends on has a block of zeros in the plainest form, as those have
    that belong to another task's head. It says nothing, and is left out where another operator's
    block has another form.

    Raises:
        ValueError: If blocks of a parameter do not fit together, naming it.
    """
    weighted = [
        block.with_eigenvalues(block.eigenvalues * weight)
        for operator, weight in zip(operators, weights, strict=True)
        for block in operator.blocks
    ]
    telling = [bool(block.eigenvalues.any()) for block in weighted]
    forms: dict[str, Form] = {}
    for of_those in (True, False):
        for block, tells in zip(weighted, telling, strict=True):
            if tells is of_those:
                for name in block.parameters:
                    forms.setdefault(name, _form(block))
    groups: dict[tuple[str, ...], list[Block]] = {}
    for block, tells in zip(weighted, telling, strict=True):
        others = {name: forms[name] for name in block.parameters if forms[name] != _form(block)}
        if tells and others:
            _refuse(block, *next(iter(others.items())))
        if not others:
            groups.setdefault(block.parameters, []).append(block)
    for block in weighted:
        for name in block.parameters:
            # The rest of a joint block of zeros, of which another operator has only a part; it will
            # grow to the size of its parameter as every block does.
            if forms[name][0] not in groups:
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


def _form(block: Block) -> Form:
    return block.parameters, block.eigenvalues.shape[0], block.transposed


def _refuse(block: Block, name: str, other: Form) -> None:
    """Raise for a block that says something of a parameter in another form than another block."""
    if block.parameters != other[0]:
        raise ValueError(
            f"parameter {name!r} has a block of its own in one operator and a joint block in "
            f"another; estimate both with the same separate_weight_and_bias"
        )
    raise ValueError(
        f"parameter {name!r} has blocks that do not fit together: (groups, transposed) is "
        f"{other[1:]} in one operator and {_form(block)[1:]} in another"
    )
