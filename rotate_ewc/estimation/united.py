"""Combine the sums of several processes after their first passes over the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rotate_ewc._utils.messages import parameters_are, quoted
from rotate_ewc._utils.numerics import statistics_dtype
from rotate_ewc.distributed.processes import Ranks
from rotate_ewc.estimation.accumulate import FirstPass
from rotate_ewc.estimation.factors import (
    ACTIVATION,
    GRADIENT,
    KroneckerFactors,
    Place,
    Side,
    owners_of,
    sides_of,
)
from rotate_ewc.layers import Form
from rotate_ewc.linalg.outer_products import Held
from rotate_ewc.tracing.block_plan import BlockKey, BlockPlan


@dataclass(frozen=True)
class _Told:
    """What a process tells the others about its first pass: only numbers and names.

    Attributes:
        num_examples: Number of examples seen.
        normalizer: What the reduction `mean` divides by.
        forms: The form of every block.
        leaders: Sides of blocks that use the factor of another block, and where that is.
        reached: Blocks that certainly get a gradient.
        unsupported: Parameters with uses for which there is no rule.
        squares: Parameters whose squared gradients were summed.
    """

    num_examples: int
    normalizer: float
    forms: Mapping[BlockKey, Form]
    leaders: Mapping[Place, Place]
    reached: frozenset[BlockKey]
    unsupported: frozenset[str]
    squares: tuple[str, ...]


def unite(
    first: FirstPass,
    unsupported: frozenset[str],
    parameters: Mapping[str, Tensor],
    ranks: Ranks,
) -> frozenset[str]:
    """Replace the sums of a first pass by those over all processes, each factor at its owner.

    A process that has seen fewer blocks than others, or none, takes over their plan.

    Args:
        first: The first pass of this process, which is changed.
        unsupported: Names of the parameters with uses for which it has found no rule.
        parameters: All parameters by name.
        ranks: The processes.

    Returns:
        The names of the parameters with uses for which any process has found no rule.

    Raises:
        ValueError: If processes have used a parameter in different ways, naming process and block;
            or if none of them has any data.
    """
    if ranks.size == 1:
        return unsupported
    told = ranks.gather(
        "plans",
        _Told(
            first.num_examples,
            first.normalizer,
            {key: factors.form for key, factors in first.factors.items()},
            dict(first.leaders),
            frozenset(first.reached),
            unsupported,
            tuple(first.squares),
        ),
    )
    _check(told)
    first.num_examples = sum(one.num_examples for one in told)
    first.normalizer = sum(one.normalizer for one in told)
    first.reached = set().union(*(one.reached for one in told))
    _take_over_plan(first, told, parameters)
    _sum_factors(first, ranks)
    for name in dict.fromkeys(name for one in told for name in one.squares):
        parameter = parameters[name]
        zeros = torch.zeros_like(parameter, dtype=statistics_dtype(parameter.dtype))
        first.squares[name] = first.squares.pop(name, zeros.detach())
    ranks.sum("squares", list(first.squares.values()))
    return frozenset[str]().union(*(one.unsupported for one in told))


def _check(told: Sequence[_Told]) -> None:
    """Raise unless the plans of all processes agree."""
    if not any(one.num_examples for one in told):
        raise ValueError("data is empty on all ranks; expected at least one batch on one of them")
    known: dict[BlockKey, tuple[int, Form]] = {}
    for rank, one in enumerate(told):
        for key, form in one.forms.items():
            first, expected = known.setdefault(key, (rank, form))
            if form != expected:
                raise ValueError(
                    f"{key.label!r} was used in different ways on rank {first} and on rank {rank}; "
                    f"expected the same layers for the data of all ranks"
                )
    planned = {name: rank for key, (rank, _) in known.items() for name in key.parameters}
    for rank, one in enumerate(told):
        if other := sorted(one.unsupported & planned.keys()):
            raise ValueError(
                f"{quoted(other)} was used by an operation without a rule on rank {rank}, but not "
                f"on rank {planned[other[0]]}; expected the same layers for the data of all ranks"
            )


def _take_over_plan(
    first: FirstPass, told: Sequence[_Told], parameters: Mapping[str, Tensor]
) -> None:
    """Give a first pass the blocks of all processes, in the same order everywhere."""
    forms = {key: form for one in reversed(told) for key, form in one.forms.items()}
    order = dict.fromkeys(key for one in told for key in one.forms)
    leaders = {place: leader for one in told for place, leader in one.leaders.items()}
    followed = {
        place: leader
        for place, leader in leaders.items()
        if all(
            one.leaders.get(place) == leader or not {place.key, leader.key} & one.forms.keys()
            for one in told
        )
    }
    for place, leader in list(first.leaders.items()):
        if place not in followed:
            first.unfollow(place, leader)
    for key in order:
        if key not in first.factors:
            plan = BlockPlan(key, parameters[key.weight], forms[key], (), True, False)
            first.factors[key] = KroneckerFactors.of(plan, first.rank_of(key.weight))
        for side in (GRADIENT, ACTIVATION):
            if Place(key, side) in followed:
                first.factors[key].replace_covariance(side, None)
    first.leaders = followed
    first.factors = {key: first.factors[key] for key in order}


def _sum_factors(first: FirstPass, ranks: Ranks) -> None:
    """Sum each factor at its owner; the other processes keep only its diagonal."""
    sides = sides_of(first.factors, first.leaders)
    sums = [side.total for side in sides]
    held = list(zip(*ranks.gather("factors held", [total.held for total in sums]), strict=True))
    _check_held(sides, held)
    owners = owners_of(sides, ranks)
    diagonals = [total.diagonal.clone() for total in sums]
    ranks.sum("diagonals", diagonals)
    tensors = [
        (tensor, owner)
        for total, owner, every in zip(sums, owners, held, strict=True)
        for tensor in total.to_be_summed(every, ranks.rank)
    ]
    ranks.reduce("factors", tensors)
    for total, owner, diagonal in zip(sums, owners, diagonals, strict=True):
        total.settle(diagonal, keep=owner == ranks.rank)


def _check_held(sides: Sequence[Side], held: Sequence[Sequence[Held]]) -> None:
    """Raise unless all processes hold each factor in forms that can be summed."""
    differing = [
        side.place.key
        for side, every in zip(sides, held, strict=True)
        if len({one for one in every if one.kind != "vectors"}) > 1
    ]
    if differing:
        names = [key.weight for key in differing]
        raise ValueError(
            f"{parameters_are(names)} used right after a weight on some ranks, but not on others, "
            f"and would keep fewer directions than the weight; expected the same layers for the "
            f"data of all ranks, or a rank of its own: rank={{{names[0]!r}: 16}}"
        )
