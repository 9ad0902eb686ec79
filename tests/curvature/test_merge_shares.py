"""Merging in several processes, which are threads here: who merges what, and what each one gets."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from rotate_ewc import EKFACLinearOperator, merge
from rotate_ewc.curvature.merge import merge_together
from rotate_ewc.linalg.block import Block
from rotate_ewc.penalty.owners import Owners
from rotate_ewc.penalty.terms import Term
from rotate_ewc.provenance import Provenance
from tests.helpers.thin import thin_block
from tests.helpers.threads import ThreadRanks, in_threads

Sizes = dict[str, tuple[int, int]]


def operator_of(blocks: Sequence[Block]) -> EKFACLinearOperator:
    shapes = {
        block.parameters[0]: (block.shape[0] * block.shape[1], block.shape[2]) for block in blocks
    }
    provenance = Provenance("MSELoss", "mean", "type2", 10, 20.0)
    return EKFACLinearOperator.from_blocks(blocks, shapes, provenance)


def random_operator(sizes: Sizes, seed: int) -> EKFACLinearOperator:
    return operator_of(
        [
            thin_block((1, *size), (None, min(2, size[1])), seed=seed + n, parameters=(name,))
            for n, (name, size) in enumerate(sizes.items())
        ]
    )


def assert_same(found: Block, expected: Block) -> None:
    assert found.parameters == expected.parameters
    assert found.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(found.tensors[n], t) for n, t in expected.tensors.items())


@pytest.mark.parametrize(
    ("sizes", "owners"),
    [
        # 5³ + 2³ is more than 4³ + 4³, but 5 + 2 less than 4 + 4
        ({"x": (1, 1), "u": (5, 2), "v": (4, 4)}, [1, 0, 1]),
        ({"x": (1, 1), "u": (4, 4), "v": (5, 2)}, [1, 1, 0]),
        # 4³ + 4³ is more than 5³ + 1³, but 4⁴ + 4⁴ less than 5⁴ + 1⁴
        ({"x": (1, 1), "u": (4, 4), "v": (5, 1)}, [1, 0, 1]),
        ({"x": (1, 1), "u": (5, 1), "v": (4, 4), "w": (3, 4)}, [0, 1, 0, 1]),
        ({"x": (1, 1), "u": (4, 4)}, [1, 0]),
        ({"x": (1, 1)}, [0]),
    ],
)
def test_the_most_expensive_go_first_and_all_get_the_same_bits(
    sizes: Sizes, owners: list[int]
) -> None:
    """What it costs is decompositions of both sides, of the sizes that they have at last.

    The first and the last parameter are in one of the operators only.
    """
    names = list(sizes)
    before = {"x": (1, 1), **dict.fromkeys(names[1:-1], (2, 1))}
    now = {name: sizes[name] for name in names[1:]}
    operators = [random_operator(before, 5), *([random_operator(now, 1)] if now else [])]
    weights = [2.0, 3.0][: len(operators)]
    alone = merge(operators, weights, rank=1)

    def merged(ranks: ThreadRanks) -> tuple[EKFACLinearOperator, list[str], list[int]]:
        found = merge_together(operators, weights, 1, ranks)
        assert ranks.devices == {torch.device("cpu")}
        return found, [place for place, _ in ranks.told], list(ranks.told[0][1])

    for rank, found in enumerate(in_threads(2, merged)):
        assert isinstance(found, tuple), found
        operator, places, own = found
        assert places == ["merged blocks"]
        assert [block.parameters[0] for block in alone.blocks] == names
        assert own == [number for number, owner in enumerate(owners) if owner == rank]
        assert operator.provenance == alone.provenance
        assert operator.parameter_shapes == alone.parameter_shapes
        for block, expected in zip(operator.blocks, alone.blocks, strict=True):
            assert_same(block, expected)


def kept_by(ranks: ThreadRanks, operator: EKFACLinearOperator, owners: dict[str, int]) -> Term:
    """What a process has of an operator of which each keeps only its share."""
    return Owners(ranks, owners).keep(Term(operator, {}, 1.0))


def test_where_blocks_have_owners() -> None:
    """The owner merges its blocks and keeps them; all others know what they look like.

    Which blocks are zero, and fit any other, they know from their owners.
    """
    sizes = {"u": (5, 2), "v": (4, 3), "w": (4, 6)}
    zeros = Block(("w",), None, None, torch.zeros(2, 2, 6, dtype=torch.float64))
    both = {name: size for name, size in sizes.items() if name != "v"}
    operators = [
        random_operator(sizes, 1),
        operator_of([*random_operator(both, 5).blocks[:1], zeros]),
    ]
    owners = {"u": 1, "v": 0, "w": 1}
    alone = merge(operators)

    def merged(ranks: ThreadRanks) -> tuple[EKFACLinearOperator, list[str]]:
        kept = [kept_by(ranks, operator, owners).operator for operator in operators]
        found = merge_together(kept, None, None, ranks, lambda block: owners[block.parameters[0]])
        return found, [place for place, _ in ranks.told]

    for rank, result in enumerate(in_threads(2, merged)):
        assert isinstance(result, tuple), result
        operator, places = result
        assert places == ["blocks of zeros", "merged blocks, shapes"]
        assert operator.parameter_shapes == alone.parameter_shapes
        for block, expected in zip(operator.blocks, alone.blocks, strict=True):
            if owners[block.parameters[0]] == rank:
                assert_same(block, expected)
                continue
            assert block.parameters == expected.parameters
            looks = {n: (t.shape, t.dtype) for n, t in expected.tensors.items()}
            assert {n: (t.shape, t.dtype) for n, t in block.tensors.items()} == looks
            assert all(tensor.is_meta for tensor in block.tensors.values())
