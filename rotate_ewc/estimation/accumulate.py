"""Sum over captured batches, block by block: first Kronecker factors, then eigenvalues.

The examples of a block are processed in microbatches that fit in memory. If memory runs out, a
microbatch is repeated in two halves. Nothing counts twice then, because every addition allocates
all its memory before it changes a sum.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from torch import Tensor

from rotate_ewc._utils.messages import quoted
from rotate_ewc._utils.numerics import check_finite
from rotate_ewc._utils.tree import place_of
from rotate_ewc._utils.validation import Rank
from rotate_ewc.estimation.factors import ACTIVATION, GRADIENT, KroneckerFactors, Place
from rotate_ewc.estimation.microbatch import Microbatch, in_halves, microbatches
from rotate_ewc.layers import Factors, LinearCall
from rotate_ewc.linalg import eigenvalues, thin_eigenvalues
from rotate_ewc.linalg.block import Block
from rotate_ewc.linalg.outer_products import OuterProducts, add_to_all
from rotate_ewc.linalg.thin_eigenvalues import squared_with_rest
from rotate_ewc.linalg.tied_eigenvalues import summed_tied
from rotate_ewc.linalg.truncation import truncation_of
from rotate_ewc.tracing.block_plan import BlockKey, BlockPlan
from rotate_ewc.tracing.capture import CapturedBatch


@dataclass
class FirstPass:
    """The sums of the first pass over the data.

    Attributes:
        reduce: Whether shared positions are summed before they enter (`KFACType.REDUCE`).
        max_bytes: Bytes that the work on one microbatch may take.
        rank_of: From the name of a parameter to how many directions are kept.
        most: Bytes that the factors may take; None is no limit. Blocks that do not fit are put off,
            except for the first one.
        finished: Blocks of earlier rounds, and blocks that have to wait for later rounds.
        put_off: Blocks that this round has put off to later ones.
        sizes: Blocks of this round, with the bytes that their factors may take.
        num_examples: Number of examples seen.
        normalizer: What the reduction `mean` divides by.
        factors: The Kronecker factors of every block.
        leaders: Sides whose factor has so far been equal to that of another block, and is therefore
            not computed, and where that factor is. A bias has the gradients of its weight, and
            layers may share an input.
        reached: Blocks that certainly get a gradient other than zero.
        squares: Squared per-example gradients of parameters with uses for which there is no rule.
    """

    reduce: bool
    max_bytes: int
    rank_of: Callable[[str], Rank]
    most: int | None = None
    finished: frozenset[BlockKey] = frozenset()
    put_off: set[BlockKey] = field(default_factory=set)
    sizes: dict[BlockKey, int] = field(default_factory=dict)
    num_examples: int = 0
    normalizer: float = 0.0
    factors: dict[BlockKey, KroneckerFactors] = field(default_factory=dict)
    leaders: dict[Place, Place] = field(default_factory=dict)
    reached: set[BlockKey] = field(default_factory=set)
    squares: dict[str, Tensor] = field(default_factory=dict)

    def add(self, captured: CapturedBatch) -> None:
        """Add a batch.

        Raises:
            ValueError: If a number is not finite, or a layer is not used as in earlier batches.
            MemoryError: If the work on a single example needs more memory than there is.
        """
        self.num_examples += captured.new_examples
        if captured.first:
            self.normalizer += captured.normalizer
        for name, squares in captured.squares.items():
            before = self.squares.get(name)
            self.squares[name] = squares if before is None else before + squares
        followed = self._followed(captured)
        plans = self._plans_of_round(captured.plans, followed)
        self._check_forms(plans)
        self._settle_leaders(plans, followed)
        for plan in plans:
            # Checked until it is true, which for most blocks is in the first batch.
            if plan.key not in self.reached and captured.reaches(plan):
                self.reached.add(plan.key)
            self._add_block(captured, plan)

    def _add_block(self, captured: CapturedBatch, plan: BlockPlan) -> None:
        total, label = self._factors(plan), plan.key.label
        gradient, activation = total.gradient_covariance, total.activation_covariance
        if gradient is None and activation is None:
            return
        per_example = plan.form.factors is Factors.NONE
        tied = plan.form.factors is Factors.TIED
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
                    add = partial(_add_tied_columns, total=gradient)
                    if not tied:
                        add = partial(_add_gradients, total=gradient, reduce=self.reduce)
                    in_halves(one, add)
                    check_finite(gradient.diagonal.sum(), f"output gradients of {label!r}")

    @property
    def elsewhere(self) -> frozenset[BlockKey]:
        """The blocks of other rounds."""
        return self.finished | self.put_off

    def _plans_of_round(
        self, plans: Sequence[BlockPlan], followed: Mapping[Place, Place]
    ) -> list[BlockPlan]:
        """Return the plans of the blocks that fit in this round, and put the others off."""
        if self.most is None:
            return list(plans)
        for plan in plans:
            if plan.key in self.sizes or plan.key in self.elsewhere:
                continue
            leaders = {s: followed.get(Place(plan.key, s)) for s in (GRADIENT, ACTIVATION)}
            total = self._begun(plan)
            own = [
                covariance
                for side, leader in leaders.items()
                if (leader is None or leader.key not in self.sizes)
                and (covariance := total.covariance(side)) is not None
            ]
            size = sum(covariance.most_bytes for covariance in own)
            weight, taken = leaders[GRADIENT], sum(self.sizes.values())
            waits = weight is not None and weight.key in self.put_off
            if waits or (size and self.sizes and taken + size > self.most):
                self.put_off.add(plan.key)
            else:
                self.sizes[plan.key] = size
        return [plan for plan in plans if plan.key in self.sizes]

    def _followed(self, captured: CapturedBatch) -> dict[Place, Place]:
        """Return the sides whose factor equals another one in this batch, and where that is."""
        found: dict[Place, Place] = {}
        first: dict[object, BlockKey] = {}
        for plan in captured.plans:
            if plan.follower is not None:
                rank = self.rank_of(plan.key.weight)
                if self.rank_of(plan.follower.weight) == rank:
                    found[Place(plan.follower, GRADIENT)] = Place(plan.key, GRADIENT)
            place = _place_of_inputs(captured, plan)
            if place is not None:
                _, d_out, d_in = plan.form.shape(plan.parameter.shape)
                leading = plan.key.leading_columns
                kept = truncation_of(self.rank_of(plan.key.weight), d_in + leading, d_out)
                same = place, leading, kept, plan.parameter.dtype
                leader = first.setdefault(same, plan.key)
                if leader != plan.key:
                    found[Place(plan.key, ACTIVATION)] = Place(leader, ACTIVATION)
        return found

    def _check_forms(self, plans: Sequence[BlockPlan]) -> None:
        known = ((plan, self.factors.get(plan.key)) for plan in plans)
        changed = [plan.key.label for plan, total in known if total and total.form != plan.form]
        if changed:
            raise ValueError(
                f"{quoted(changed)} was used in different ways in different batches; expected the "
                f"same layers in all (if there was one example in the first batch, put a larger "
                f"one first)"
            )

    def _factors(self, plan: BlockPlan) -> KroneckerFactors:
        """Return the factors of a block so far; they are created at its first batch."""
        if plan.key not in self.factors:
            self.factors[plan.key] = self._begun(plan)
        return self.factors[plan.key]

    def _begun(self, plan: BlockPlan) -> KroneckerFactors:
        return KroneckerFactors.of(plan, self.rank_of(plan.key.weight))

    def unfollow(self, place: Place, leader: Place) -> None:
        """Give one side of a block a factor of its own: at first, a copy of another block's."""
        del self.leaders[place]
        covariance, own = self.factors[leader.key].covariance(leader.side), self.factors[place.key]
        if covariance is not None:
            covariance = covariance.clone(own.truncations[place.side != GRADIENT])
        own.replace_covariance(place.side, covariance)

    def drop(self, keys: Collection[BlockKey]) -> None:
        """Forget blocks that another process has put off."""
        for place, leader in list(self.leaders.items()):
            if place.key in keys:
                del self.leaders[place]
            elif leader.key in keys:
                self.unfollow(place, leader)
        for key in keys:
            self.factors.pop(key, None)

    def _settle_leaders(self, plans: Sequence[BlockPlan], followed: Mapping[Place, Place]) -> None:
        """Give sides a copy as soon as their factor no longer equals that of another block."""
        for place, leader in list(self.leaders.items()):
            if followed.get(place) != leader:
                self.unfollow(place, leader)
        present, known = {plan.key for plan in plans}, set(self.factors)
        for plan in plans:
            for side in (GRADIENT, ACTIVATION):
                place = Place(plan.key, side)
                found = followed.get(place)
                if found is None or found.key not in present or {plan.key, found.key} & known:
                    continue
                self.leaders[place] = found
                self._factors(plan).replace_covariance(side, None)


@dataclass
class SecondPass:
    """The sums of the second pass over the data: the eigenvalues, in the bases of the first.

    Attributes:
        blocks: The blocks whose eigenvalues are summed.
        leaders: As in the first pass.
        max_bytes: Bytes that the work on one microbatch may take.
        elsewhere: The blocks of other rounds.
    """

    blocks: Mapping[BlockKey, Block]
    leaders: Mapping[Place, Place]
    max_bytes: int
    elsewhere: frozenset[BlockKey] = frozenset()

    def add(self, captured: CapturedBatch) -> None:
        """Add a batch's squared per-example gradients in the eigenbases.

        Raises:
            ValueError: If a number is not finite, or a parameter was not used in the first pass.
            MemoryError: If the work on a single example needs more memory than there is.
        """
        plans = [plan for plan in captured.plans if plan.key not in self.elsewhere]
        new = [plan.key.label for plan in plans if plan.key not in self.blocks]
        if new:
            raise ValueError(
                f"{quoted(new)} was used in the second pass over the data but not in the first; "
                f"the model and the data must be the same in both"
            )
        following = {
            plan.follower
            for plan in plans
            if plan.follower is not None and self._follows(plan.follower, plan.key)
        }
        for plan in plans:
            if plan.key in following:
                continue
            block = self.blocks[plan.key]
            follower = self.blocks[plan.follower] if plan.follower in following else None
            for microbatch in microbatches(captured, plan, self.max_bytes):
                if plan.form.factors is Factors.OUTER_PRODUCTS:
                    add = partial(_add_outer_products, block=block, follower=follower)
                    in_halves(microbatch, add)
                    continue
                add = partial(_OF_FORMS[plan.form.factors], block=block)
                for one in microbatch.by_vector():
                    in_halves(one, add)

    def _follows(self, bias: BlockKey, weight: BlockKey) -> bool:
        """Whether a bias has the gradient factor of a weight."""
        return self.leaders.get(Place(bias, GRADIENT)) == Place(weight, GRADIENT)


def _place_of_inputs(captured: CapturedBatch, plan: BlockPlan) -> object:
    """Return the place and layout in memory of a linear layer's inputs; None if unknown."""
    if len(plan.uses) != 1 or plan.form.factors is not Factors.OUTER_PRODUCTS:
        return None
    (use,) = plan.uses
    call, inputs = captured.uses[use].call, captured.inputs[use]
    if not plan.form.activation_basis or not isinstance(call, LinearCall):
        return None
    if captured.present[use] is not None or not inputs.numel():
        return None
    return place_of(inputs)


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
    """Add `Σ G Gᵀ` and `Σ Gᵀ G`, sums over the columns and over the rows of G."""
    (gradients,) = microbatch.per_example_gradients()
    sides = (
        (total.gradient_covariance, gradients.mT),
        (total.activation_covariance, gradients),
    )
    add_to_all([(side, vectors) for side, vectors in sides if side is not None])


def _add_tied_columns(microbatch: Microbatch, total: OuterProducts) -> None:
    """Add `Σ G Gᵀ` of an embedding tied to an output layer."""
    (factors,) = microbatch.tied_factors()
    total.add(factors.columns())


def _add_tied(microbatch: Microbatch, block: Block) -> None:
    """Add to the eigenvalues of an embedding tied to an output layer."""
    (factors,) = microbatch.tied_factors()
    squares = summed_tied(factors, block.gradient_basis, microbatch.max_bytes)
    check_finite(squares.sum(), f"gradients of {microbatch.label!r}")
    block.eigenvalues.add_(squares)


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
    """Add to the eigenvalues of a block that has only whole per-example gradients."""
    (gradients,) = microbatch.per_example_gradients()
    squared = thin_eigenvalues.summed_entries if block.is_thin else eigenvalues.squared_entries
    squares = squared(gradients, block.gradient_basis, block.activation_basis)
    check_finite(squares.sum(), f"gradients of {microbatch.label!r}")
    block.eigenvalues.add_(squares)


_OF_FORMS: Final[Mapping[Factors, Callable[..., None]]] = {
    Factors.LOOKUP: _add_lookups,
    Factors.TIED: _add_tied,
    Factors.NONE: _add_squares,
}
"""How a microbatch adds to the eigenvalues of a block whose form is not outer products."""


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
