"""Keeping fewer directions of a block, and how many of a sum, by loops over plain numbers."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from rotate_ewc.linalg.block import Block
from rotate_ewc.linalg.cut import cut, ranks_of_sum
from tests.helpers.thin import orthonormal, thin_block


def column(size: int, *groups: Sequence[float], inputs: bool = False) -> Block:
    """A block whose other side has one direction, so that its eigenvalues are partial traces.

    With fewer than `size` directions, of which the last number is that of the rest.
    """
    values = torch.tensor(groups, dtype=torch.float64)[:, :, None]
    rank = values.shape[1] - 1 if values.shape[1] < size else size
    basis = orthonormal(len(values), size, rank, 1)
    if inputs:
        return Block(("w",), None, basis, values.mT.contiguous())
    return Block(("w",), basis, None, values)


def rank_by_loops(block: Block, side: int, part: float) -> int:
    """The fewest whose loss is within what may be lost, in every group.

    What does not stand out from the rest, or from the smallest if there is no rest, is no loss.
    """
    size, rank = block.shape[1 + side], block.ranks[side]
    found = 1
    for traces in block.partial_traces[side].tolist():
        rest = traces[rank] if rank < size else min(traces)
        total = sum(traces[:rank]) + (size - rank) * rest
        excess = sorted((max(0.0, trace - rest) for trace in traces[:rank]), reverse=True)
        fewest = next(k for k in range(rank + 1) if sum(excess[k:]) <= (1.0 - part) * total + 1e-12)
        found = max(found, fewest)
    return found


# --- how many of a sum ---


@pytest.mark.parametrize("inputs", [False, True])
def test_a_part_of_the_trace_to_the_number(inputs: bool) -> None:
    """Of 5, 3, 2 and twice 1, a quarter is 3: what 3 and 2 are more than the rest."""
    side = int(inputs)
    block = column(5, [2.0, 5.0, 3.0, 1.0], inputs=inputs)
    assert ranks_of_sum(0.75, block)[side] == 1
    assert ranks_of_sum(0.7500001, block)[side] == 2
    assert ranks_of_sum(0.92, block)[side] == 3
    # The rest may be more than what is kept, which does not stand out then.
    assert ranks_of_sum(0.9, column(5, [2.0, 5.0, 3.0, 4.0], inputs=inputs))[side] == 1
    # The group that needs most, each with its own rest and total.
    groups = column(5, [2.0, 5.0, 3.0, 1.0], [0.1, 9.0, 0.1, 0.1], inputs=inputs)
    assert ranks_of_sum(0.75, groups)[side] == 1
    assert ranks_of_sum(0.8, groups)[side] == 2
    # The other side has one direction, which is kept.
    assert ranks_of_sum(0.75, block)[1 - side] == 1


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ranks", [(3, 4), (5, 6), (None, 4), (3, None)], ids=str)
def test_a_part_of_the_trace_by_loops(ranks: tuple[int | None, int | None], seed: int) -> None:
    block = thin_block((3, 5, 6), ranks, seed=seed)
    block = block.with_eigenvalues(block.eigenvalues**4)
    for part in (0.3, 0.6, 0.8, 0.9, 0.97, 0.999):
        expected = tuple(rank_by_loops(block, side, part) for side in (0, 1))
        assert ranks_of_sum(part, block) == expected


def test_numbers_and_words() -> None:
    block = thin_block((2, 5, 6), (3, 4))
    assert ranks_of_sum(2, block) == (2, 2)
    assert ranks_of_sum(9, block) == (5, 6)
    assert ranks_of_sum(1.0, block) == (5, 6)
    assert ranks_of_sum("full", block) == (None, None)
    # Each side against the other one.
    assert ranks_of_sum("auto", thin_block((1, 130, 2), (20, 2))) == (16, None)
    assert ranks_of_sum("auto", thin_block((1, 2, 130), (2, 20))) == (None, 16)


# --- keeping fewer ---


def test_ranks_that_are_none() -> None:
    block = thin_block((2, 5, 6), (3, 4))
    for arguments, name, rank in (
        ((0, 2), "gradient_rank", 0),
        ((None, -1), "activation_rank", -1),
    ):
        with pytest.raises(ValueError, match="expected") as raised:
            cut(block, *arguments)
        assert str(raised.value) == (
            f"{name} is {rank}; expected at least 1, or None for all directions"
        )


def test_nothing_is_cut() -> None:
    for block in (thin_block((2, 5, 6), (3, 4)), thin_block((2, 5, 6), (None, None))):
        assert cut(block, None, None) is block
        assert cut(block, 5, 6) is block
        assert cut(block, *block.ranks) is block
    assert cut(thin_block((2, 5, 6), (3, 4)), 1, 1).ranks == (1, 1)


@pytest.mark.parametrize("inputs", [False, True])
def test_the_largest_are_kept_in_their_order(inputs: bool) -> None:
    """Of the rest the mean is kept, of as many directions as there are."""
    block = column(6, [1.0, 7.0, 2.0, 5.0, 3.0], [9.0, 1.0, 4.0, 8.0, 0.5], inputs=inputs)
    found = cut(block, *((None, 2) if inputs else (2, None)))
    values = found.eigenvalues.mT if inputs else found.eigenvalues
    expected = [[7.0, 5.0, (1.0 + 2.0 + 2 * 3.0) / 4], [9.0, 8.0, (1.0 + 4.0 + 2 * 0.5) / 4]]
    assert values[:, :, 0].tolist() == expected
    assert values.is_contiguous() or values.mT.is_contiguous()
    name = "activation_basis" if inputs else "gradient_basis"
    for group, columns in enumerate(([1, 3], [0, 3])):
        basis, before = found.tensors[name][group], block.tensors[name][group]
        assert torch.equal(basis, before[:, columns])


@pytest.mark.parametrize("inputs", [False, True])
def test_the_mean_of_equal_numbers_is_that_number_to_the_bit(inputs: bool) -> None:
    """In each column and group, whatever there is beside; rounded up or down it would be else."""
    size, kept, count = 14, 3, 200
    generator = torch.Generator().manual_seed(0)
    equal = torch.rand(2, 1, count, generator=generator) * torch.tensor([[[0.5]], [[3.0]]])
    values = equal.expand(2, size, count).clone()
    values[:, [1, 5, 6]] += 9.0
    basis = orthonormal(2, size, size, 1).float()
    plain = values[:, [0, 2, 3, 4, *range(7, size)]].sum(dim=1) / (size - kept)
    assert bool((plain > equal[:, 0]).any())
    assert bool((plain < equal[:, 0]).any())
    if inputs:
        block = Block(("w",), None, basis, values.mT.contiguous())
        found = cut(block, None, kept).eigenvalues.mT
    else:
        found = cut(Block(("w",), basis, None, values), kept, None).eigenvalues
    assert torch.equal(found[:, -1], equal[:, 0])
    assert torch.equal(found[:, :-1], values[:, [1, 5, 6]])
