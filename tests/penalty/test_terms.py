"""Terms and stacks of their blocks, by plain tensors and dense matrices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rotate_ewc import EKFACLinearOperator
from rotate_ewc.linalg.block import Block
from rotate_ewc.penalty.terms import Stack, Term, stack_terms
from rotate_ewc.provenance import Provenance
from tests.helpers.oracles import assert_close, dense_block
from tests.helpers.thin import thin_block

# Parameters by name, in blocks of two groups of 2 × 3, joint with a bias, and transposed.
SHAPES = {"w": (4, 3), "v": (4, 2), "b": (4,), "e": (6, 4)}


def blocks_of(seed: int, rank: int | None = 2) -> list[Block]:
    sizes = (2, 2, 3)
    return [
        thin_block(sizes, (2, rank), seed=seed),
        thin_block(sizes, (2, 3), seed=seed + 1, parameters=("v", "b")),
        thin_block((2, 4, 3), (None, 3), seed=seed + 2, parameters=("e",), transposed=True),
    ]


def term(seed: int, weight: float = 1.0, rank: int | None = 2, **changed: Any) -> Term:
    """Random blocks and anchors.

    Args:
        seed: Of their numbers.
        weight: The term's.
        rank: Of the inputs of the first block.
        **changed: Other values for fields of the first block.
    """
    generator = torch.Generator().manual_seed(seed)
    anchor = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in SHAPES.items()
    }
    first, *others = blocks_of(seed, rank)
    provenance = Provenance("MSELoss", "mean", "type2", 10 + seed, 20.0)
    blocks = [replace(first, **changed), *others]
    return Term(EKFACLinearOperator.from_blocks(blocks, SHAPES, provenance), anchor, weight)


def all_kept(_: str) -> bool:
    return True


def same_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


# --- one term ---


def test_every_tensor_is_mapped() -> None:
    one = term(1, 0.7)
    halved = one.map(lambda tensor: 0.5 * tensor)
    assert halved.weight == 0.7
    assert halved.anchor.keys() == one.anchor.keys()
    assert all(torch.equal(halved.anchor[n], 0.5 * a) for n, a in one.anchor.items())
    for new, old in zip(halved.operator.blocks, one.operator.blocks, strict=True):
        assert new.tensors.keys() == old.tensors.keys()
        assert all(torch.equal(new.tensors[n], 0.5 * t) for n, t in old.tensors.items())


def test_blocks_of_unwanted_parameters_are_left_out() -> None:
    """A joint block goes with either of its parameters, and takes the other's anchor with it."""
    one, asked = term(1, 0.7), {}

    def wanted(name: str, anchor: Tensor) -> bool:
        asked[name] = anchor
        return name != "b"

    left = one.only(wanted)
    assert asked.keys() == SHAPES.keys()
    assert all(anchor is one.anchor[name] for name, anchor in asked.items())
    assert left is not None
    assert [block.parameters for block in left.operator.blocks] == [("w",), ("e",)]
    for block in left.operator.blocks:
        before = one.operator.block(block.parameters[0])
        assert all(tensor is before.tensors[name] for name, tensor in block.tensors.items())
    assert left.operator.parameter_shapes == {"w": (4, 3), "e": (6, 4)}
    assert left.operator.provenance == one.operator.provenance
    assert list(left.anchor) == ["w", "e"]
    assert all(anchor is one.anchor[name] for name, anchor in left.anchor.items())
    assert left.weight == 0.7


def test_nothing_is_left_out_or_nothing_is_left() -> None:
    one = term(1)
    assert one.only(lambda *_: True) is one
    assert one.only(lambda *_: False) is None
    assert one.only(lambda name, _: name == "v") is None


# --- stacks ---


@pytest.mark.parametrize("rank", [2, 3, None])
def test_blocks_of_one_form_are_groups_of_one_block(rank: int | None) -> None:
    """With the weights in the eigenvalues, and the parameters' layout in memory."""
    terms = [term(1, 0.5, rank), term(5, 2.0, rank), term(9, 3.0, rank)]
    viewing, stacks = stack_terms(terms, all_kept)
    assert [stack.names for stack in stacks] == [("w",), ("v", "b"), ("e",)]
    assert [stack.block.parameters for stack in stacks] == [("0/w",), ("1/v", "1/b"), ("2/e",)]
    for number, stack in enumerate(stacks):
        blocks = [one.operator.blocks[number] for one in terms]
        dense = [one.weight * dense_block(b) for one, b in zip(terms, blocks, strict=True)]
        assert_close(dense_block(stack.block), torch.cat(dense))
        assert stack.block.transposed == (number == 2)
        values = stack.block.eigenvalues
        assert (values.mT if stack.block.transposed else values).is_contiguous()
        for anchors, name in zip(stack.anchors, stack.names, strict=True):
            assert torch.equal(anchors, torch.stack([one.anchor[name] for one in terms]))
        # What is found of the block once is found before the first product.
        assert {"_rotations", "products"} & vars(stack.block).keys()
    for new, old in zip(viewing, terms, strict=True):
        assert new.weight == old.weight
        assert new.anchor is old.anchor
        assert new.operator.provenance == old.operator.provenance
        for stack, view, block in zip(
            stacks, new.operator.blocks, old.operator.blocks, strict=True
        ):
            assert view.parameters == block.parameters
            assert view.tensors.keys() == block.tensors.keys()
            assert all(torch.equal(view.tensors[n], t) for n, t in block.tensors.items())
            for basis in ("gradient_basis", "activation_basis"):
                if basis in view.tensors:
                    assert same_memory(view.tensors[basis], stack.block.tensors[basis])


def test_one_alone_is_not_copied() -> None:
    """It may be as large as a model; anchors get the layout that products need."""
    one = term(1)
    one.anchor["w"] = one.anchor["w"].mT.contiguous().mT
    _, stacks = stack_terms([one], all_kept)
    for stack, block in zip(stacks, one.operator.blocks, strict=True):
        for name in ("gradient_basis", "activation_basis"):
            assert stack.block.tensors.get(name) is block.tensors.get(name)
        for name, anchors in zip(stack.names, stack.anchors, strict=True):
            assert anchors.is_contiguous()
            assert torch.equal(anchors[0], one.anchor[name])
            assert same_memory(anchors, one.anchor[name]) == (name != "w")


@pytest.mark.parametrize(
    "changed",
    [
        {"parameters": ("u",)},
        {"gradient_basis": None},
        {"activation_basis": thin_block((2, 2, 3), (2, 1)).activation_basis},
        {"gradient_basis": torch.eye(2).expand(2, 2, 2)},
        {"activation_basis": thin_block((2, 2, 4), (2, 2)).activation_basis},
        {"eigenvalues": torch.ones(2, 2, 3)},
        {"eigenvalues": torch.ones(2, 2, 4, dtype=torch.float64), "activation_basis": None},
        {"transposed": True},
        {"w": torch.zeros(5, 3, dtype=torch.float64)},
        {"w": torch.zeros(12, dtype=torch.float64)},
    ],
    ids=lambda changed: "+".join(changed),
)
def test_other_forms_are_other_stacks(changed: Mapping[str, Any]) -> None:
    """And blocks of the first form go on being found, whatever came in between."""
    other = term(9, **{name: value for name, value in changed.items() if name != "w"})
    other.anchor.update({n: t for n, t in changed.items() if n == "w"}, u=other.anchor["w"])
    _, stacks = stack_terms([term(1), other, term(5)], all_kept)
    # Of the two groups of each block.
    assert [len(stack.block.eigenvalues) // 2 for stack in stacks] == [2, 3, 3, 1]
    assert [len(stack.anchors[0]) for stack in stacks] == [2, 3, 3, 1]


def test_numbers_are_the_same_whatever_a_process_keeps() -> None:
    """The blocks that it does not keep are left as they are."""
    terms = [term(1), term(5)]
    asked: list[str] = []

    def is_kept(name: str) -> bool:
        asked.append(name)
        return name != "v"

    viewing, stacks = stack_terms(terms, is_kept)
    assert asked == ["w", "v", "e"]
    assert [stack.block.parameters for stack in stacks] == [("0/w",), ("2/e",)]
    for new, old in zip(viewing, terms, strict=True):
        block, before = new.operator.block("v"), old.operator.block("v")
        assert all(tensor is before.tensors[name] for name, tensor in block.tensors.items())
        view, before = new.operator.block("e"), old.operator.block("e")
        assert torch.equal(view.tensors["activation_basis"], before.tensors["activation_basis"])


def test_members_have_both_names_and_anchors() -> None:
    _, stacks = stack_terms([term(1), term(5)], all_kept)
    weight, bias = stacks[1].members
    assert weight == ("1/v", "v", stacks[1].anchors[0])
    assert bias == ("1/b", "b", stacks[1].anchors[1])
    for fewer in (
        Stack(("v",), stacks[1].block, stacks[1].anchors),
        Stack(("v", "b"), stacks[1].block, stacks[1].anchors[:1]),
    ):
        with pytest.raises(ValueError, match="zip"):
            list(fewer.members)
