"""The two Kronecker factors of a block, and the bases that come out of them between the passes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

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


@dataclass
class KroneckerFactors:
    """The two Kronecker factors of one block, summed over the data.

    Attributes:
        form: How the block is made.
        shape: `(groups, d_out, d_in)`.
        template: An empty tensor of the statistics' dtype and device.
        gradient_covariance: `Σ g gᵀ`, `[groups, d_out, d_out]`; None if that side has no basis.
        activation_covariance: `Σ a aᵀ`, `[groups, d_in, d_in]`; None likewise.
        gradient_truncation: Which eigenvectors of the first are kept; None is all.
    """

    form: Form
    shape: tuple[int, int, int]
    template: Tensor
    gradient_covariance: OuterProducts | None
    activation_covariance: OuterProducts | None
    gradient_truncation: Truncation | None

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
            of_outputs,
        )

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
    """One factor that is to be decomposed.

    Attributes:
        key: The block's parameters.
        name: `"gradient"` or `"activation"`.
        total: The factor.
    """

    key: BlockKey
    name: str
    total: OuterProducts


def sides_of(
    factors: Mapping[BlockKey, KroneckerFactors], leaders: Mapping[BlockKey, BlockKey]
) -> list[Side]:
    """Return all factors that are to be decomposed, in order."""
    own = {key: total for key, total in factors.items() if key not in leaders}
    sides = [(key, "gradient", total.gradient_covariance) for key, total in own.items()]
    sides += [(key, "activation", total.activation_covariance) for key, total in own.items()]
    return [Side(key, name, total) for key, name, total in sides if total is not None]


def owners_of(sides: Sequence[Side], ranks: Ranks) -> list[int]:
    """Return which process decomposes each factor."""
    shapes = (side.total.diagonal.shape for side in sides)
    return ranks.owners([groups * size**3 for groups, size in shapes])


def decompose(
    factors: Mapping[BlockKey, KroneckerFactors],
    leaders: Mapping[BlockKey, BlockKey],
    ranks: Ranks,
) -> dict[BlockKey, Block]:
    """Return the blocks in the eigenbases of their factors; all eigenvalues are zero still.

    In a thin block they will be sums, also over the complement.

    Args:
        factors: The factors of every block; of several processes, those that this one owns.
        leaders: Blocks whose gradient factor is that of another one, and this other one.
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
    labels = [f"{side.name} factor of {side.key.label!r}" for side in mine]
    with advising(_advice(factors, leaders)):
        bases = eigenvectors([side.total for side in mine], labels)
        own = {(s.key, s.name): {"basis": b} for s, b in zip(mine, bases, strict=True)}
        device = next((t.template.device for t in factors.values()), torch.device("cpu"))
        found = {place: t["basis"] for place, t in ranks.share("bases", own, device).items()}
        for key, leader in leaders.items():
            if (leader, "gradient") in found:
                basis = found[leader, "gradient"]
                size, rank = basis.shape[1:]
                with naming_matrix(f"the basis of {key.label!r}", size, basis.dtype, rank):
                    found[key, "gradient"] = _last(basis, factors[key].gradient_truncation)
    return {
        key: _empty_block(key, total, found.get((key, "gradient")), found.get((key, "activation")))
        for key, total in factors.items()
    }


def _last(basis: Tensor, truncation: Truncation | None) -> Tensor:
    """Return the eigenvectors of another one's basis that a block keeps of it.

    They are a copy, since snapshots are files of tensors that share nothing.
    """
    rank = basis.shape[2]
    kept = rank if truncation is None else min(rank, truncation.most)
    return basis[:, :, rank - kept :].clone(memory_format=torch.contiguous_format)


def _advice(
    factors: Mapping[BlockKey, KroneckerFactors], leaders: Mapping[BlockKey, BlockKey]
) -> str:
    """Return what to do where memory runs out: without the largest sides there is more."""
    # A bias that follows a weight has the same gradient factor.
    shared = {key: factors[leader].gradient_covariance for key, leader in leaders.items()}
    sides = {
        key: _largest(t.activation_covariance, shared.get(key, t.gradient_covariance))
        for key, t in factors.items()
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
