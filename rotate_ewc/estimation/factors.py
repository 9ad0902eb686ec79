"""The two Kronecker factors of a block, and the bases that come out of them between the passes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import Tensor

from rotate_ewc._utils.messages import left_out, listed
from rotate_ewc._utils.numerics import statistics_dtype, underflowed
from rotate_ewc._utils.out_of_memory import advising, naming_matrix
from rotate_ewc._utils.validation import AUTO, Rank
from rotate_ewc.distributed.processes import Ranks
from rotate_ewc.layers import Form
from rotate_ewc.linalg.block import Block
from rotate_ewc.linalg.outer_products import OuterProducts, eigenvectors
from rotate_ewc.linalg.truncation import Truncation, truncation_of
from rotate_ewc.tracing.block_plan import BlockKey, BlockPlan

GRADIENT: Final = "gradient"
ACTIVATION: Final = "activation"


class Place(NamedTuple):
    """One side of a block.

    Attributes:
        key: The block's parameters.
        side: `"gradient"` or `"activation"`.
    """

    key: BlockKey
    side: str


@dataclass
class KroneckerFactors:
    """The two Kronecker factors of one block, summed over the data.

    Attributes:
        form: How the block is made.
        shape: `(groups, d_out, d_in)`.
        template: An empty tensor of the statistics' dtype and device.
        gradient_covariance: `Σ g gᵀ`, `[groups, d_out, d_out]`; None if that side has no basis.
        activation_covariance: `Σ a aᵀ`, `[groups, d_in, d_in]`; None likewise.
        truncations: Which eigenvectors of both are kept; None is all.
    """

    form: Form
    shape: tuple[int, int, int]
    template: Tensor
    gradient_covariance: OuterProducts | None
    activation_covariance: OuterProducts | None
    truncations: tuple[Truncation | None, Truncation | None]

    @classmethod
    def of(cls, plan: BlockPlan, rank: Rank) -> KroneckerFactors:
        """Begin the factors of a block, of which so many eigenvectors will be kept."""
        groups, d_out, d_in = plan.form.shape(plan.parameter.shape)
        d_in += plan.key.leading_columns
        dtype = statistics_dtype(plan.parameter.dtype)
        template = plan.parameter.detach().new_empty(0, dtype=dtype)
        of_outputs = truncation_of(rank, d_out, d_in)
        of_inputs = truncation_of(rank, d_in, d_out)
        gradient = OuterProducts(groups, d_out, template, of_outputs)
        activation = OuterProducts(groups, d_in, template, of_inputs)
        return cls(
            plan.form,
            (groups, d_out, d_in),
            template,
            gradient if plan.form.gradient_basis else None,
            activation if plan.form.activation_basis else None,
            (of_outputs, of_inputs),
        )

    def covariance(self, side: str) -> OuterProducts | None:
        """Return the factor of one side."""
        return self.gradient_covariance if side == GRADIENT else self.activation_covariance

    def replace_covariance(self, side: str, covariance: OuterProducts | None) -> None:
        """Replace the factor of one side; None where it is that of another block."""
        if side == GRADIENT:
            self.gradient_covariance = covariance
        else:
            self.activation_covariance = covariance

    @property
    def keeps_all(self) -> bool:
        """Whether all eigenvectors are kept of a side that need not keep them all."""
        _, d_out, d_in = self.shape
        sides = ((self.gradient_covariance, d_out, d_in), (self.activation_covariance, d_in, d_out))
        return any(
            side is not None and side.truncation is None and truncation_of(AUTO, d, other)
            for side, d, other in sides
        )

    @property
    def underflowed(self) -> bool:
        """Whether one of the factors is too small for its dtype."""
        sides = (self.gradient_covariance, self.activation_covariance)
        return any(side is not None and underflowed(side.diagonal) for side in sides)


class Side(NamedTuple):
    """One factor to decompose.

    Attributes:
        place: Of which block, and which side of it.
        total: The factor.
    """

    place: Place
    total: OuterProducts


def sides_of(
    factors: Mapping[BlockKey, KroneckerFactors], leaders: Mapping[Place, Place]
) -> list[Side]:
    """Return all factors to decompose, in order."""
    sides = [
        (Place(key, side), total.covariance(side))
        for side in (GRADIENT, ACTIVATION)
        for key, total in factors.items()
    ]
    return [
        Side(place, total) for place, total in sides if total is not None and place not in leaders
    ]


def owners_of(sides: Sequence[Side], ranks: Ranks) -> list[int]:
    """Return which process decomposes each factor."""
    return ranks.owners([side.total.decomposition_cost for side in sides])


def decompose(
    factors: Mapping[BlockKey, KroneckerFactors],
    leaders: Mapping[Place, Place],
    ranks: Ranks,
) -> dict[BlockKey, Block]:
    """Return the blocks in the eigenbases of their factors; all eigenvalues are zero still.

    In a thin block they will be sums, also over the complement.

    Args:
        factors: The factors of every block; of several processes, those that this one owns.
        leaders: Sides whose factor is that of another block, and where that is.
        ranks: The processes, each of which decomposes what it owns.

    Raises:
        ValueError: If a joint block would claim a parameter that another block claims too, or a
            factor cannot be decomposed.
        MemoryError: If there is not enough memory; the message names the factor.
    """
    _check_partition(factors)
    sides = sides_of(factors, leaders)
    mine = [
        side
        for side, owner in zip(sides, owners_of(sides, ranks), strict=True)
        if owner == ranks.rank
    ]
    labels = [f"{s.place.side} factor of {s.place.key.label!r}" for s in mine]
    with advising(_advice(factors, leaders)):
        bases = eigenvectors([side.total for side in mine], labels)
        own = {s.place: {"basis": b} for s, b in zip(mine, bases, strict=True)}
        device = next((t.template.device for t in factors.values()), torch.device("cpu"))
        found = {place: t["basis"] for place, t in ranks.share("bases", own, device).items()}
        for place, leader in leaders.items():
            if leader not in found:
                continue
            basis = found[leader]
            if place.side == GRADIENT:
                size, rank = basis.shape[1:]
                with naming_matrix(f"the basis of {place.key.label!r}", size, basis.dtype, rank):
                    basis = _last(basis, factors[place.key].truncations[0])
            found[place] = basis
    return {
        key: _empty_block(
            key, total, found.get(Place(key, GRADIENT)), found.get(Place(key, ACTIVATION))
        )
        for key, total in factors.items()
    }


def _last(basis: Tensor, truncation: Truncation | None) -> Tensor:
    """Return the eigenvectors of another one's basis that a block keeps of it.

    They are a copy: a bias and its weight are merged with other tasks each by itself.
    """
    rank = basis.shape[2]
    kept = rank if truncation is None else min(rank, truncation.most)
    return basis[:, :, rank - kept :].clone(memory_format=torch.contiguous_format)


def _advice(factors: Mapping[BlockKey, KroneckerFactors], leaders: Mapping[Place, Place]) -> str:
    """Return what to do where memory runs out: without the largest sides there is more."""

    def covariance(key: BlockKey, side: str) -> OuterProducts | None:
        place = leaders.get(Place(key, side), Place(key, side))
        return factors[place.key].covariance(place.side)

    sides = {
        key: _largest(covariance(key, ACTIVATION), covariance(key, GRADIENT)) for key in factors
    }
    largest = max(sides.values(), default=0)
    names = [name for key, side in sides.items() if side == largest for name in key.parameters]
    advice = left_out(names)
    if any(total.keeps_all for total in factors.values()):
        advice += ", or keep fewer directions (rank='auto')"
    if any(total.template.dtype is torch.float64 for total in factors.values()):
        advice += ", or use a model in float32 (model.float())"
    return advice


def _largest(*sides: OuterProducts | None) -> int:
    return max((side.diagonal.shape[1] for side in sides if side is not None), default=0)


def _empty_block(
    key: BlockKey, total: KroneckerFactors, gradient: Tensor | None, activation: Tensor | None
) -> Block:
    if activation is not None:
        # Rows of the eigenvectors are reordered, rather than both sides of the matrix before.
        activation = total.form.columns_of(activation.mT, leading=key.leading_columns).mT
    groups, d_out, d_in = total.shape
    rows, columns = _rows(gradient, d_out), _rows(activation, d_in)
    eigenvalues = total.template.new_zeros(groups, rows, columns)
    return Block(key.parameters, gradient, activation, eigenvalues, total.form.transposed)


def _rows(basis: Tensor | None, size: int) -> int:
    """Return how many rows of eigenvalues a side has: with one for the complement, if any."""
    return size if basis is None or basis.shape[2] == size else basis.shape[2] + 1


def _check_partition(keys: Iterable[BlockKey]) -> None:
    """Raise if joint blocks would claim parameters that other blocks claim too."""
    owners: dict[str, list[BlockKey]] = {}
    for key in keys:
        for name in key.parameters:
            owners.setdefault(name, []).append(key)
    told = [
        f"parameter {name!r} is used in different pairs of weight and bias "
        f"({' and '.join(repr(key.label) for key in several)})"
        for name, several in owners.items()
        if len(several) > 1
    ]
    if told:
        raise ValueError(
            f"{listed(told)}, which have no joint block; pass separate_weight_and_bias=True"
        )
