"""Estimate the blocks: the two passes over the data.

Pass one sums the Kronecker factors, whose eigenvectors become the bases. Pass two finds, in these
bases, the exact mean squares of the per-example gradients. Both see the same observations; as many
as fit in the memory budget are kept, and the model runs again only for the batches of which they
are not, or which the loader has changed.

Everything is summed in a fixed order: on a CPU the same seed, the same batches and the same number
of threads give the same bits, in every process. Another number of threads rounds differently, by
which the bases of equal eigenvalues may turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rotate_ewc._utils.numerics import check_trace, is_faint, statistics_dtype
from rotate_ewc._utils.out_of_memory import in_pieces
from rotate_ewc.estimation.accumulate import (
    Covariances,
    add_covariances,
    add_eigenvalues,
    empty_blocks,
)
from rotate_ewc.estimation.activation_cache import Keeper
from rotate_ewc.estimation.capture import Observer
from rotate_ewc.estimation.captured_batch import Observation
from rotate_ewc.estimation.data import check_reiterable, naming_batch
from rotate_ewc.linalg.block import Block, matrix_shape
from rotate_ewc.losses import Likelihood
from rotate_ewc.options import EstimationSettings, KFACType, Unsupported
from rotate_ewc.tracing.block_plan import BlockKey, Plan


@dataclass(frozen=True)
class Estimate:
    """What estimation found.

    Attributes:
        blocks: One for every parameter, or pair of weight and bias.
        num_examples: Examples seen.
        used: The blocks of the parameters on which an output depended.
        faint: Those that get gradients whose squares are too small for their dtype.
        unused: Names of the parameters on which no output depended.
        unsupported: Names of the parameters for whose uses there is no rule.
    """

    blocks: tuple[Block, ...]
    num_examples: int
    used: tuple[Block, ...]
    faint: tuple[Block, ...]
    unused: tuple[str, ...]
    unsupported: tuple[str, ...]


def estimate(
    forward: Callable[[Any], Tensor],
    likelihood: Likelihood,
    parameters: Mapping[str, Tensor],
    data: Iterable[Any],
    settings: EstimationSettings,
    constants: Sequence[Tensor] = (),
    num_data: int | None = None,
) -> Estimate:
    """Estimate the Fisher matrix of a loss over a data set, block by block.

    Args:
        forward: From a batch's inputs to the model's outputs.
        likelihood: The distribution behind the loss.
        parameters: What the matrix is over, by name; all must require gradients.
        data: Re-iterable batches (inputs, targets).
        settings: How to estimate.
        constants: The model's tensors that are no parameters, such as buffers.
        num_data: Examples that the data stand for, where they are a sample of a larger set.

    Returns:
        Blocks in the order of `parameters`. A parameter on which the outputs do not depend has a
        block of zeros, its exact Fisher matrix; one that is to be skipped has none.

    Raises:
        ValueError: If the data, outputs or a layer cannot be handled; the message names which.
        TypeError: If the outputs, or a batch's parts, have the wrong type.
    """
    check_reiterable(data)
    observer = Observer(forward, likelihood, parameters, settings, constants)
    found = _Accumulator(settings)
    for observation in observer.observe(data, "factors"):
        with naming_batch(observation.batch):
            found.add_factors(observation)
        # Or it would live on while the model runs on the next batch.
        del observation
    found.decompose()
    for observation in _observed_again(observer, found.keeper, data):
        with naming_batch(observation.batch):
            found.add_eigenvalues(observation)
        del observation
    scale = found.scale(likelihood, num_data)
    by_name = {}
    used = (*found.blocks.values(), *found.diagonal_blocks())
    for block in used:
        block.eigenvalues.mul_(scale)
        check_trace(block.trace, block.label)
        by_name.update(dict.fromkeys(block.parameters, block))
    skip = settings.unsupported is Unsupported.SKIP
    unsupported = tuple(name for name in parameters if name in observer.unsupported)
    wanted = [name for name in parameters if not (skip and name in unsupported)]
    ordered = [
        by_name[name] if name in by_name else _diagonal(name, torch.zeros_like(parameters[name]))
        for name in wanted
    ]
    unused = tuple(name for name in wanted if name not in by_name)
    blocks = tuple(dict.fromkeys(ordered))
    return Estimate(blocks, found.num_examples, used, found.faint_blocks(), unused, unsupported)


def _observed_again(
    observer: Observer, keeper: Keeper, data: Iterable[Any]
) -> Iterator[Observation]:
    """Return all observations for the second time, as far as possible those that were kept."""
    kept = keeper.take_all()
    return observer.observe(data, "eigenvalues", keeper) if kept is None else kept


class _Accumulator:
    """The sums over the data, and the observations kept for the second pass.

    Attributes:
        blocks: The blocks, from `decompose` on.
        num_examples: Examples seen.
        keeper: The observations.
    """

    def __init__(self, settings: EstimationSettings) -> None:
        self.blocks: dict[BlockKey, Block] = {}
        self.num_examples = 0
        self.keeper = Keeper(settings.memory_budget // 2)
        self._settings = settings
        self._mass = 0.0
        self._covariances: dict[BlockKey, Covariances] = {}
        self._squares: dict[str, Tensor] = {}
        self._leaders: dict[BlockKey, BlockKey] = {}
        self._reached: set[BlockKey] = set()
        self._faint: set[BlockKey] = set()

    def add_factors(self, observation: Observation) -> None:
        """Pass one: add an observation to the Kronecker factors, and keep it if there is room."""
        if observation.first:
            self.num_examples += observation.num_examples
            self._mass += observation.mass
        for name, squares in observation.squares.items():
            self._squares[name] = (
                self._squares[name] + squares if name in self._squares else squares
            )
        self._settle_followers(observation)
        reduce = self._settings.kfac_approx is KFACType.REDUCE
        for plan in observation.plans:
            # Looked at until it is so, which for most blocks is in the first batch.
            if plan.key not in self._reached and observation.reaches(plan):
                self._reached.add(plan.key)
            if plan.key in self._leaders:
                continue
            additions = partial(
                add_covariances, total=self._total(plan, observation), reduce=reduce
            )
            for portion in observation.portions(plan, self._settings.memory_budget // 4):
                in_pieces(portion, additions)
        self.keeper.offer(observation)

    def decompose(self) -> None:
        """Between the passes: turn the factors into bases."""
        self._check_partition()
        self._faint = {key for key, total in self._covariances.items() if total.faint}
        self.blocks = empty_blocks(self._covariances, self._leaders)
        self._covariances.clear()

    def add_eigenvalues(self, observation: Observation) -> None:
        """Pass two: add an observation's squared per-example gradients in the eigenbases."""
        following = {
            bias: weight
            for bias, weight in observation.followers.items()
            if self._leaders.get(bias) == weight
        }
        for plan in observation.plans:
            if plan.key in following:
                continue
            if plan.key not in self.blocks:
                raise ValueError(
                    f"{plan.key.label!r} was used in the second pass over the data but not in the "
                    f"first; the model and the data must be the same in both"
                )
            follower = self.blocks[plan.follower] if plan.follower in following else None
            additions = partial(add_eigenvalues, block=self.blocks[plan.key], follower=follower)
            for portion in observation.portions(plan, self._settings.memory_budget // 4):
                in_pieces(portion, additions)

    def diagonal_blocks(self) -> list[Block]:
        """Return the blocks of the parameters for whose uses there is no rule."""
        return [_diagonal(name, squares) for name, squares in self._squares.items()]

    def faint_blocks(self) -> tuple[Block, ...]:
        """Return the blocks that get gradients whose squares are too small."""
        return tuple(
            block
            for key, block in self.blocks.items()
            if key in self._reached and (key in self._faint or is_faint(block.eigenvalues))
        )

    def scale(self, likelihood: Likelihood, num_data: int | None) -> float:
        """Return the factor from sums over the examples seen to the loss's own reduction."""
        if likelihood.reduction == "mean":
            if self._mass <= 0:
                raise ValueError(
                    "no target in the data counts (all are ignored, or have weight 0), so that the "
                    "mean loss is not defined; expected at least one"
                )
            return 1.0 / self._mass
        return (num_data or self.num_examples) / max(1, self.num_examples)

    def _total(self, plan: Plan, observation: Observation) -> Covariances:
        """Return the factors of a block so far, which begin with its first observation."""
        key = plan.key
        if key not in self._covariances:
            self._covariances[key] = Covariances.of(plan, observation.parameters[key.weight])
        if self._covariances[key].form != plan.form:
            raise ValueError(
                f"{key.label!r} was used in different ways in different batches; "
                f"expected the same layers in all"
            )
        return self._covariances[key]

    def _settle_followers(self, observation: Observation) -> None:
        """Say which biases have the same output factor as a weight, in all observations so far.

        Theirs is not computed. As soon as a bias has not, it goes on from a copy.
        """
        followers = observation.followers
        for key, leader in list(self._leaders.items()):
            if followers.get(key) != leader:
                del self._leaders[key]
                output = self._covariances[leader].output
                self._covariances[key].output = None if output is None else output.clone()
        for plan in observation.plans:
            if plan.key not in followers:
                continue
            leader = followers[plan.key]
            if not {plan.key, leader} & self._covariances.keys():
                self._leaders[plan.key] = leader
                self._total(plan, observation)

    def _check_partition(self) -> None:
        """Raise if a joint block would claim a parameter that another block claims too."""
        owners: dict[str, BlockKey] = {}
        for key in self._covariances:
            for name in key.parameters:
                if name in owners:
                    raise ValueError(
                        f"parameter {name!r} is used in different pairs of weight and bias "
                        f"({owners[name].label!r} and {key.label!r}), which have no joint block; "
                        f"pass separate_weight_and_bias=True"
                    )
                owners[name] = key


def _diagonal(name: str, values: Tensor) -> Block:
    """Return a block with the identity for both bases."""
    dtype = statistics_dtype(values.dtype)
    shape = matrix_shape(values.shape, groups=1, transposed=False)
    return Block((name,), None, None, values.detach().reshape(shape).to(dtype))
