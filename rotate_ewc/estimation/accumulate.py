"""Sum what captured batches show, block by block: Kronecker factors first, eigenvalues later.

The examples of a block are worked on in microbatches that fit in memory. So that nothing counts
twice where one is taken again in halves, whatever adds to a sum allocates all it takes before it
changes the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from rotate_ewc._utils.messages import quoted
from rotate_ewc._utils.numerics import check_finite
from rotate_ewc._utils.validation import Rank
from rotate_ewc.estimation.factors import KroneckerFactors
from rotate_ewc.estimation.microbatch import Microbatch, in_halves, microbatches
from rotate_ewc.layers import Factors
from rotate_ewc.linalg import eigenvalues, thin_eigenvalues
from rotate_ewc.linalg.block import Block
from rotate_ewc.linalg.outer_products import OuterProducts, add_to_all
from rotate_ewc.linalg.thin_eigenvalues import squared_with_rest
from rotate_ewc.tracing.block_plan import BlockKey, BlockPlan
from rotate_ewc.tracing.capture import CapturedBatch


@dataclass
class FirstPass:
    """The sums of the first pass over the data.

    Attributes:
        reduce: Whether shared positions are summed before they enter (`KFACType.REDUCE`).
        max_bytes: What the work on one microbatch may take.
        rank_of: How many directions are kept, by the name of a parameter.
        num_examples: Examples seen.
        normalizer: What the reduction `mean` divides by.
        factors: The Kronecker factors of every block.
        leaders: The weights, by biases whose gradient factor has so far been that of the weight.
            Theirs is not computed.
        reached: The blocks that obviously get a gradient that is not zero.
        squares: Squared per-example gradients of the parameters for whose uses there is no rule.
    """

    reduce: bool
    max_bytes: int
    rank_of: Callable[[str], Rank]
    num_examples: int = 0
    normalizer: float = 0.0
    factors: dict[BlockKey, KroneckerFactors] = field(default_factory=dict)
    leaders: dict[BlockKey, BlockKey] = field(default_factory=dict)
    reached: set[BlockKey] = field(default_factory=set)
    squares: dict[str, Tensor] = field(default_factory=dict)

    def add(self, captured: CapturedBatch) -> None:
        """Add what a batch shows.

        Raises:
            ValueError: If a number is not finite, or a layer is not used as in earlier batches.
            MemoryError: If the work on a single example takes more memory than there is.
        """
        if captured.first:
            self.num_examples += captured.num_examples
            self.normalizer += captured.normalizer
        for name, squares in captured.squares.items():
            before = self.squares.get(name)
            self.squares[name] = squares if before is None else before + squares
        self._check_forms(captured.plans)
        self._settle_leaders(captured)
        for plan in captured.plans:
            # Looked at until it is so, which for most blocks is in the first batch.
            if plan.key not in self.reached and captured.reaches(plan):
                self.reached.add(plan.key)
            if plan.key not in self.leaders:
                self._add_block(captured, plan)

    def _add_block(self, captured: CapturedBatch, plan: BlockPlan) -> None:
        total, label = self._factors(plan), plan.key.label
        gradient, activation = total.gradient_covariance, total.activation_covariance
        if gradient is None and activation is None:
            return
        per_example = plan.form.factors is Factors.NONE
        for microbatch in microbatches(captured, plan, self.max_bytes):
            if activation is not None and not per_example and captured.first:
                in_halves(
                    microbatch, partial(_add_activations, total=activation, reduce=self.reduce)
                )
                check_finite(activation.diagonal.sum(), f"layer inputs of {label!r}")
            for one in microbatch.by_vector():
                if per_example:
                    in_halves(one, partial(_add_rows_and_columns, total=total))
                    for side in (gradient, activation):
                        if side is not None:
                            check_finite(side.diagonal.sum(), f"gradients of {label!r}")
                elif gradient is not None:
                    in_halves(one, partial(_add_gradients, total=gradient, reduce=self.reduce))
                    check_finite(gradient.diagonal.sum(), f"output gradients of {label!r}")

    def _check_forms(self, plans: Sequence[BlockPlan]) -> None:
        known = ((plan, self.factors.get(plan.key)) for plan in plans)
        changed = [plan.key.label for plan, total in known if total and total.form != plan.form]
        if changed:
            raise ValueError(
                f"{quoted(changed)} was used in different ways in different batches; expected the "
                f"same layers in all"
            )

    def _factors(self, plan: BlockPlan) -> KroneckerFactors:
        """Return the factors of a block so far, which begin with its first batch."""
        if plan.key not in self.factors:
            rank = self.rank_of(plan.key.weight)
            self.factors[plan.key] = KroneckerFactors.of(plan, rank)
        return self.factors[plan.key]

    def unfollow(self, key: BlockKey, leader: BlockKey) -> None:
        """Let a bias go on from a copy of the gradient factor of a weight."""
        del self.leaders[key]
        covariance = self.factors[leader].gradient_covariance
        if covariance is not None:
            covariance = covariance.clone(self.factors[key].gradient_truncation)
        self.factors[key].gradient_covariance = covariance

    def _settle_leaders(self, captured: CapturedBatch) -> None:
        """Let biases go on from a copy as soon as their factor is no longer that of a weight."""
        followers = {
            p.follower: p.key
            for p in captured.plans
            if p.follower is not None
            and self.rank_of(p.follower.weight) == self.rank_of(p.key.weight)
        }
        for key, weight in list(self.leaders.items()):
            if followers.get(key) != weight:
                self.unfollow(key, weight)
        for plan in captured.plans:
            leader = followers.get(plan.key)
            if leader is not None and not {plan.key, leader} & self.factors.keys():
                self.leaders[plan.key] = leader
                self._factors(plan).gradient_covariance = None


@dataclass
class SecondPass:
    """The sums of the second pass over the data: the eigenvalues, in the bases of the first.

    Attributes:
        blocks: The blocks, whose eigenvalues are summed.
        leaders: As in the first pass.
        max_bytes: What the work on one microbatch may take.
    """

    blocks: Mapping[BlockKey, Block]
    leaders: Mapping[BlockKey, BlockKey]
    max_bytes: int

    def add(self, captured: CapturedBatch) -> None:
        """Add a batch's squared per-example gradients in the eigenbases.

        Raises:
            ValueError: If a number is not finite, or a parameter was not used in the first pass.
            MemoryError: If the work on a single example takes more memory than there is.
        """
        new = [plan.key.label for plan in captured.plans if plan.key not in self.blocks]
        if new:
            raise ValueError(
                f"{quoted(new)} was used in the second pass over the data but not in the first; "
                f"the model and the data must be the same in both"
            )
        following = {
            plan.follower
            for plan in captured.plans
            if plan.follower is not None and self.leaders.get(plan.follower) == plan.key
        }
        for plan in captured.plans:
            if plan.key in following:
                continue
            block = self.blocks[plan.key]
            follower = self.blocks[plan.follower] if plan.follower in following else None
            for microbatch in microbatches(captured, plan, self.max_bytes):
                if plan.form.factors is Factors.OUTER_PRODUCTS:
                    add = partial(_add_outer_products, block=block, follower=follower)
                    in_halves(microbatch, add)
                    continue
                lookup = plan.form.factors is Factors.LOOKUP
                for one in microbatch.by_vector():
                    in_halves(one, partial(_add_lookups if lookup else _add_squares, block=block))


def _add_activations(microbatch: Microbatch, total: OuterProducts, reduce: bool) -> None:
    """Add the outer products of inputs, or of their means over shared positions."""
    total.add(microbatch.mean_activations() if reduce else microbatch.block_activations())


def _add_gradients(microbatch: Microbatch, total: OuterProducts, reduce: bool) -> None:
    """Add the outer products of output gradients, or of their sums over shared positions."""
    (gradients,) = microbatch.block_gradients()
    if microbatch.plan.form.factors is Factors.LOOKUP:
        # Zeros where an embedding looks up its padding.
        gradients = gradients * (microbatch.block_activations() >= 0)
    total.add(gradients.sum(dim=2, keepdim=True) if reduce else gradients)


def _add_rows_and_columns(microbatch: Microbatch, total: KroneckerFactors) -> None:
    """Add `Σ G Gᵀ` and `Σ Gᵀ G`, of which the vectors are the columns and the rows of G."""
    (gradients,) = microbatch.per_example_gradients()
    sides = (
        (total.gradient_covariance, gradients.mT),
        (total.activation_covariance, gradients),
    )
    add_to_all([(side, vectors) for side, vectors in sides if side is not None])


def _add_lookups(microbatch: Microbatch, block: Block) -> None:
    """Add to the eigenvalues of an embedding."""
    (gradients,) = microbatch.block_gradients()
    indices = microbatch.block_activations()[0, :, :, 0]
    basis, vocabulary = block.gradient_basis, block.eigenvalues.shape[2]
    if basis is not None and block.is_thin:
        squares = thin_eigenvalues.summed_lookups(gradients[0], indices, vocabulary, basis)
    else:
        rotated = eigenvalues.rotate(gradients, basis)[0]
        squares = eigenvalues.squared_lookups(rotated, indices, vocabulary)
    block.eigenvalues.add_(squares.mT)


def _add_squares(microbatch: Microbatch, block: Block) -> None:
    """Add to the eigenvalues of a block that knows only whole per-example gradients."""
    (gradients,) = microbatch.per_example_gradients()
    squared = thin_eigenvalues.summed_entries if block.is_thin else eigenvalues.squared_entries
    squares = squared(gradients, block.gradient_basis, block.activation_basis)
    check_finite(squares.sum(), f"gradients of {microbatch.label!r}")
    block.eigenvalues.add_(squares)


def _add_outer_products(microbatch: Microbatch, block: Block, follower: Block | None) -> None:
    """Add to the eigenvalues of a weight, and of a bias that follows it in the same basis."""
    activations, basis = microbatch.block_activations(), block.activation_basis
    if basis is not None:
        leading = microbatch.plan.key.leading_columns
        basis = microbatch.plan.form.features_of(basis.mT, leading=leading).mT
    if follower is not None:
        squares = squared_with_rest(microbatch.block_gradients(), block.gradient_basis)
        of_inputs = squared_with_rest([activations], basis)
        product = eigenvalues.single_position_product(squares, of_inputs)
        (rank, _), (of_follower, _), (_, d_out, _) = block.ranks, follower.ranks, block.shape
        of_bias = squares.sum(dim=(1, 2))[..., None]
        of_bias = thin_eigenvalues.thinned(of_bias, rank, of_follower, d_out)
        block.eigenvalues.add_(product)
        follower.eigenvalues.add_(of_bias)
        return
    _, d_out, d_in = block.shape
    shared, num_vectors = activations.shape[2], len(microbatch.vectors)
    if block.is_thin:
        bases = block.gradient_basis, basis
        ranks = [None if one is None else one.shape[2] for one in bases]
        thin_route = thin_eigenvalues.cheapest_thin_route(
            shared, (d_out, d_in), (ranks[0], ranks[1]), num_vectors
        )
        sums = thin_eigenvalues.summed_projections(
            microbatch.block_gradients(), activations, *bases, thin_route, microbatch.max_bytes
        )
        block.eigenvalues.add_(sums)
        return
    route = eigenvalues.cheapest_route(shared, d_out, d_in, num_vectors)
    total = eigenvalues.squared_projections(
        microbatch.block_gradients(),
        activations,
        block.gradient_basis,
        basis,
        route,
        microbatch.max_bytes,
    )
    if basis is None:
        leading = microbatch.plan.key.leading_columns
        total = microbatch.plan.form.columns_of(total, leading=leading)
    block.eigenvalues.add_(total)
