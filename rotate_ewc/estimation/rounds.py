"""Two passes over the data for as many blocks at a time as there is memory for their factors.

Most models need one round. In every round the model's gradients reach all layers, so with R of them
an estimation takes R times as long, and the memory for Kronecker factors is a part of what it would
be; sampled labels are the same in all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from rotate_ewc.distributed.processes import Ranks
from rotate_ewc.estimation.accumulate import FirstPass, SecondPass
from rotate_ewc.estimation.factors import decompose
from rotate_ewc.estimation.united import unite
from rotate_ewc.linalg.block import Block
from rotate_ewc.losses import Likelihood
from rotate_ewc.options import KFACType
from rotate_ewc.tracing.block_plan import BlockKey
from rotate_ewc.tracing.capture import BatchCapturer
from rotate_ewc.tracing.passes import Passes, ReiterableData


@dataclass
class Sums:
    """What all rounds have summed.

    Attributes:
        blocks: The blocks, whose eigenvalues are sums over the data.
        num_examples: Examples seen.
        normalizer: What the reduction `mean` divides by.
        squares: Squared per-example gradients of the parameters for whose uses there is no rule.
        unsupported: The names of all such parameters.
        reached: The blocks that obviously get a gradient that is not zero.
        tiny: Those of which a factor is too small for its dtype.
    """

    blocks: dict[BlockKey, Block] = field(default_factory=dict)
    num_examples: int = 0
    normalizer: float = 0.0
    squares: Mapping[str, Tensor] = field(default_factory=dict)
    unsupported: frozenset[str] = frozenset()
    reached: set[BlockKey] = field(default_factory=set)
    tiny: set[BlockKey] = field(default_factory=set)


def estimate_in_rounds(
    capturer: BatchCapturer, data: ReiterableData, parameters: Mapping[str, Tensor], ranks: Ranks
) -> Sums:
    """Sum the factors of all blocks, decompose them and sum eigenvalues, in one round or several.

    Args:
        capturer: Runs the model.
        data: Batches (inputs, targets).
        parameters: What the matrix is over, by name.
        ranks: The processes that estimate together, in the same rounds. Each holds the factors of
            a round until it is known which of them it decomposes.

    Returns:
        The same sums in all processes.
    """
    settings, found = capturer.settings, Sums()
    waiting: frozenset[BlockKey] = frozenset()
    while True:
        first = FirstPass(
            settings.kfac_approx is KFACType.REDUCE,
            settings.memory_budget // 4,
            settings.rank_of,
            settings.memory_budget,
            waiting | frozenset(found.blocks),
        )
        passes = Passes(capturer, data, settings.memory_budget // 2, ranks)
        passes.first(first.add, with_squares=not found.blocks)
        _agree(capturer.likelihood, ranks)
        without_rule = capturer.unsupported or frozenset()
        left, waiting = _put_off_together(first, waiting, ranks)
        capturer.unsupported = unite(first, without_rule, parameters, ranks)
        found.tiny |= {key for key, factors in first.factors.items() if factors.underflowed}
        found.reached |= first.reached
        bases = decompose(first.factors, first.leaders, ranks)
        first.factors.clear()
        second = SecondPass(bases, first.leaders, first.max_bytes, first.elsewhere)
        passes.second(second.add)
        ranks.sum("eigenvalues", [block.eigenvalues for block in bases.values()])
        if not found.blocks:
            found.num_examples, found.normalizer = first.num_examples, first.normalizer
            found.squares, found.unsupported = first.squares, capturer.unsupported
        found.blocks.update(bases)
        if not left:
            return found


def _put_off_together(
    first: FirstPass, waiting: frozenset[BlockKey], ranks: Ranks
) -> tuple[frozenset[BlockKey], frozenset[BlockKey]]:
    """Let all processes put off the layers for which any of them has no room.

    Processes whose data use the layers in different orders may have room for different ones, and
    for none in common. Then the next round is for what the first of them has had room for, and if
    it was for such blocks already, for a single one.

    Args:
        first: The first pass of this process, which is changed.
        waiting: The blocks that this round is not for.
        ranks: The processes.

    Returns:
        The blocks that are left for later rounds, and those that the next one is not for.
    """
    if ranks.size > 1:
        told = ranks.gather("rounds", (frozenset(first.put_off), tuple(first.sizes)))
        first.put_off = set().union(*(put_off for put_off, _ in told))
        first.drop(first.put_off)
        if first.put_off and all(first.put_off.issuperset(sizes) for _, sizes in told):
            kept = next(sizes for _, sizes in told if sizes)
            left = waiting | first.put_off
            return left, left.difference(kept[:1] if waiting else kept)
    return waiting | first.put_off, frozenset()


def _agree(likelihood: Likelihood, ranks: Ranks) -> None:
    """Have all processes know what any of them has seen of a loss."""
    if likelihood.has_distribution or ranks.size == 1:
        return
    known: dict[str, tuple[int, Any]] = {}
    for rank, observed in enumerate(ranks.gather("loss", likelihood.observed)):
        for name, value in observed.items():
            first, expected = known.setdefault(name, (rank, value))
            if value != expected:
                raise ValueError(
                    f"loss_func {likelihood.name} has {name} {expected!r} on rank {first}, but "
                    f"{value!r} on rank {rank}; expected the same on all ranks: return a loss for "
                    f"each example"
                )
    likelihood.take_over({name: value for name, (_, value) in known.items()})
