"""Estimate the blocks: the two passes over the data.

Pass one sums the Kronecker factors, whose eigenvectors become the bases. Pass two finds, in these
bases, the exact mean squares of the per-example gradients. Both see the same observations; when
those fit in the memory budget they are kept, and the model runs over the data only once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rotate_ewc import kernels
from rotate_ewc.batches import check_reiterable
from rotate_ewc.block import Block
from rotate_ewc.fisher import Likelihood
from rotate_ewc.observation import BlockKey, Observation
from rotate_ewc.observer import Observer
from rotate_ewc.options import EstimationSettings, KFACType


@dataclass(frozen=True)
class Estimate:
    """What estimation found.

    Attributes:
        blocks: One for every parameter, or pair of weight and bias.
        num_examples: Examples seen.
        unused: Names of the parameters on which no output depended.
    """

    blocks: tuple[Block, ...]
    num_examples: int
    unused: tuple[str, ...]


def estimate(
    forward: Callable[[Any], Tensor],
    likelihood: Likelihood,
    parameters: Mapping[str, Tensor],
    data: Iterable[Any],
    settings: EstimationSettings,
) -> Estimate:
    """Estimate the Fisher matrix of a loss over a data set, block by block.

    Args:
        forward: From a batch's inputs to the model's outputs.
        likelihood: The distribution behind the loss.
        parameters: What the matrix is over, by name; all must require gradients.
        data: Re-iterable batches (inputs, targets).
        settings: How to estimate.

    Returns:
        Blocks in the order of `parameters`. A parameter on which the outputs do not depend has a
        block of zeros, its exact Fisher matrix.

    Raises:
        ValueError: If the data, outputs or a layer cannot be handled; the message names which.
        TypeError: If the outputs, or a batch's parts, have the wrong type.
    """
    check_reiterable(data)
    observer = Observer(forward, likelihood, parameters, settings)
    keeper = _Keeper(settings.memory_budget // 2)
    factors: dict[BlockKey, _Factors] = {}
    for observation in observer.observe(data, "factors"):
        _add_factors(observation, factors, settings)
        keeper.keep(observation)
    _check_pairs(factors)
    blocks = {key: _empty_block(key, factors.pop(key)) for key in list(factors)}

    num_examples, mass = 0, 0.0
    for observation in keeper.replay() or observer.observe(data, "eigenvalues"):
        num_examples += observation.num_examples if observation.first else 0
        mass += observation.mass if observation.first else 0.0
        _add_eigenvalues(observation, blocks, settings)
    if likelihood.reduction == "mean":
        scale = 1.0 / mass if mass else 0.0
    else:
        scale = (settings.num_data or num_examples) / max(1, num_examples)
    for block in blocks.values():
        block.eigenvalues.mul_(scale)
    by_name = {name: block for block in blocks.values() for name in block.parameters}
    ordered = [
        by_name[name] if name in by_name else _zero_block(name, parameter)
        for name, parameter in parameters.items()
    ]
    unused = tuple(name for name in parameters if name not in by_name)
    return Estimate(tuple(dict.fromkeys(ordered)), num_examples, unused)


@dataclass
class _Factors:
    """The Kronecker factors of one block, summed over the data.

    Attributes:
        gradient_covariance: `[groups, d_out, d_out]`.
        activation_covariance: `[groups, d_in, d_in]`; None for a bias.
    """

    gradient_covariance: Tensor
    activation_covariance: Tensor | None


class _Keeper:
    """Keeps observations for the second pass, or none once they exceed the memory budget."""

    def __init__(self, max_bytes: int) -> None:
        self._kept: list[Observation] = []
        self._left = max_bytes

    def keep(self, observation: Observation) -> None:
        """Keep one more, unless the budget is spent."""
        self._left -= observation.num_bytes
        if self._left >= 0:
            self._kept.append(observation)
        else:
            self._kept.clear()

    def replay(self) -> list[Observation]:
        """Return all observations; none where the data have to be gone over again.

        That is also so for a loader that fills the same buffer for every batch: the layers' inputs
        that were kept are then no longer those of their batches.
        """
        intact = all(use.unmodified for observation in self._kept for use in observation.uses)
        return self._kept if intact else []


def _add_factors(
    observation: Observation, factors: dict[BlockKey, _Factors], settings: EstimationSettings
) -> None:
    """Pass one: add an observation to the Kronecker factors."""
    reduce = settings.kfac_approx is KFACType.REDUCE
    for key, indices in observation.by_block(settings.separate_weight_and_bias).items():
        for chunk in observation.chunks(key, indices, settings.memory_budget // 8):
            total = factors.get(key)
            activations = None if total is None else total.activation_covariance
            if observation.first and key.weight is not None:
                inputs = observation.activations(key, indices, chunk)
                inputs = inputs.mean(dim=2, keepdim=True) if reduce else inputs
                activations = _add(activations, inputs, f"layer inputs of {key.label!r}")
            gradients = None if total is None else total.gradient_covariance
            for which in range(len(observation.gradient_sets)):
                vectors = observation.gradients(which, indices, chunk)
                # A bias has no inputs to average, so the sum over positions is exact for it.
                summed = reduce or key.weight is None
                vectors = vectors.sum(dim=2, keepdim=True) if summed else vectors
                gradients = _add(gradients, vectors, f"output gradients of {key.label!r}")
            if gradients is not None:
                factors[key] = _Factors(gradients, activations)


def _add(total: Tensor | None, vectors: Tensor, what: str) -> Tensor:
    addition = kernels.covariance_sum(vectors)
    # A sum of squares is finite only if every number in it is.
    if not bool(torch.isfinite(addition.diagonal(dim1=1, dim2=2).sum())):
        raise ValueError(f"the {what} are not finite (NaN, infinity, or overflow when squared)")
    return addition if total is None else total.add_(addition)


def _check_pairs(keys: Iterable[BlockKey]) -> None:
    """Raise if a joint block would claim a parameter that another block claims too."""
    owners: dict[str, BlockKey] = {}
    for key in keys:
        for name in key.parameters:
            if name in owners:
                raise ValueError(
                    f"parameter {name!r} is used in different pairs of weight and bias "
                    f"({owners[name].label!r} and {key.label!r}), which have no joint block; pass "
                    f"separate_weight_and_bias=True"
                )
            owners[name] = key


def _empty_block(key: BlockKey, factors: _Factors) -> Block:
    """Decompose the factors; the eigenvalues are still to be summed."""
    gradient_basis = kernels.eigenbasis(factors.gradient_covariance)
    activation_basis, d_in = None, 1
    if factors.activation_covariance is not None:
        activation_basis = kernels.eigenbasis(factors.activation_covariance)
        d_in = activation_basis.shape[1]
    eigenvalues = gradient_basis.new_zeros(*gradient_basis.shape[:2], d_in)
    return Block(key.parameters, gradient_basis, activation_basis, eigenvalues)


def _zero_block(name: str, parameter: Tensor) -> Block:
    """The block of a parameter on which the outputs do not depend."""
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    rows = parameter.shape[0] if parameter.ndim else 1
    return Block(
        (name,),
        None,
        None,
        parameter.new_zeros(1, rows, parameter.numel() // max(1, rows), dtype=dtype),
    )


def _add_eigenvalues(
    observation: Observation, blocks: Mapping[BlockKey, Block], settings: EstimationSettings
) -> None:
    """Pass two: add an observation's squared per-example gradients in the eigenbases."""
    for key, indices in observation.by_block(settings.separate_weight_and_bias).items():
        if key not in blocks:
            raise ValueError(
                f"{key.label!r} was used in the second pass over the data but not in the first; "
                f"the model and the data must be the same in both"
            )
        for chunk in observation.chunks(key, indices, settings.memory_budget // 8):
            for addition in _squares(observation, indices, chunk, key, blocks[key]):
                blocks[key].eigenvalues.add_(addition)


def _squares(
    observation: Observation, indices: Sequence[int], chunk: slice, key: BlockKey, block: Block
) -> Iterator[Tensor]:
    """Yield terms of one block's eigenvalues, each `[groups, d_out, d_in]`."""
    rotated = (
        kernels.rotate(observation.gradients(which, indices, chunk), block.gradient_basis)
        for which in range(len(observation.gradient_sets))
    )
    if key.weight is None:
        for gradients in rotated:
            yield gradients.sum(dim=2).square_().sum(dim=1)[:, :, None]
        return
    inputs = observation.activations(key, indices, chunk)
    inputs = kernels.rotate(inputs, block.activation_basis)
    if inputs.shape[2] > 1:
        for gradients in rotated:
            yield kernels.squared_projections(gradients, inputs)
        return
    # With one position, the squares of all vectors can be summed before the one product.
    total = next(rotated).square_()
    for gradients in rotated:
        total += gradients.square_()
    yield kernels.single_position_product(total, inputs.square_())
