"""From portions of observations to Kronecker factors, bases and eigenvalues, for each form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from rotate_ewc._utils.numerics import check_finite, is_faint, statistics_dtype
from rotate_ewc.estimation.captured_batch import Portion
from rotate_ewc.layers import Factors, Form
from rotate_ewc.linalg import kronecker
from rotate_ewc.linalg.block import Block
from rotate_ewc.linalg.eigenvalues import (
    cheapest_route,
    single_position_product,
    squared_projections,
    squared_rotations,
)
from rotate_ewc.linalg.outer_products import OuterProducts, eigenvectors
from rotate_ewc.tracing.block_plan import BlockKey, Plan


@dataclass
class Covariances:
    """The two Kronecker factors of one block, summed over the data.

    Attributes:
        form: How the block is made.
        shape: `(groups, d_out, d_in)`.
        template: An empty tensor of the statistics' dtype and device.
        output: Of vectors of d_out entries; None if that side has no basis.
        input: Of vectors of d_in entries; None likewise.
    """

    form: Form
    shape: tuple[int, int, int]
    template: Tensor
    output: OuterProducts | None = None
    input: OuterProducts | None = None

    @classmethod
    def of(cls, plan: Plan, parameter: Tensor) -> Covariances:
        """Begin the factors of a block.

        Args:
            plan: The block's plan.
            parameter: Its weight, or whatever parameter it has.
        """
        groups, d_out, d_in = plan.form.shape(parameter.shape)
        shape = (groups, d_out, d_in + (plan.key.bias is not None))
        dtype = statistics_dtype(parameter.dtype)
        return cls(plan.form, shape, parameter.detach().new_empty(0, dtype=dtype))

    def add_outputs(self, vectors: Tensor, what: str) -> None:
        """Add the outer products of output gradients `[groups, n, shared, d_out]`."""
        self.output = self._added(self.output, vectors, self.shape[1], what)

    def add_inputs(self, vectors: Tensor, what: str) -> None:
        """Add the outer products of inputs `[groups, n, shared, d_in]`."""
        self.input = self._added(self.input, vectors, self.shape[2], what)

    @property
    def faint(self) -> bool:
        """Whether one of the factors is too small for its dtype."""
        sides = [side for side in (self.output, self.input) if side is not None]
        return any(is_faint(side.diagonal) for side in sides)

    def _added(
        self, total: OuterProducts | None, vectors: Tensor, size: int, what: str
    ) -> OuterProducts:
        if total is None:
            total = OuterProducts(self.shape[0], size, self.template)
        total.add(vectors)
        check_finite(total.diagonal.sum(), what)
        return total


def add_covariances(
    portion: Portion, done: int, total: Covariances, *, reduce: bool
) -> Iterator[None]:
    """Add a portion's examples to the Kronecker factors of its block.

    The additions (see `in_pieces`) are that of the inputs, in a batch's first observation, and one
    for every output vector; or for every output vector one on each side that has a basis.

    Args:
        portion: The examples.
        done: Number of additions that have been made.
        total: The factors so far.
        reduce: Whether shared positions are summed before they enter (`KFACType.REDUCE`).

    Raises:
        ValueError: If a number is not finite.
    """
    factors, label = total.form.factors, portion.label
    if factors is Factors.NONE:
        yield from _add_rows_and_columns(portion, done, total)
        return
    if factors is Factors.OUTER_PRODUCTS and portion.observation.first:
        if done == 0:
            inputs = portion.activations()
            inputs = inputs.mean(dim=2, keepdim=True) if reduce else inputs
            total.add_inputs(inputs, f"layer inputs of {label!r}")
            del inputs
            yield
        done = max(0, done - 1)
    for gradients in _kept_gradients(portion, done):
        vectors = gradients.sum(dim=2, keepdim=True) if reduce else gradients
        total.add_outputs(vectors, f"output gradients of {label!r}")
        yield


def empty_blocks(
    factors: Mapping[BlockKey, Covariances], leaders: Mapping[BlockKey, BlockKey]
) -> dict[BlockKey, Block]:
    """Decompose the factors; the eigenvalues are still to be summed.

    Args:
        factors: The factors of every block.
        leaders: Blocks whose output factor is that of another one, and this other one.
    """
    own = [(key, total) for key, total in factors.items() if key not in leaders]
    sides = [(key, "output", total.output) for key, total in own]
    sides += [(key, "input", total.input) for key, total in own]
    present = [(key, side, total) for key, side, total in sides if total is not None]
    labels = [f"{side} factor of {key.label!r}" for key, side, _ in present]
    bases = eigenvectors([total for *_, total in present], labels)
    found = {place[:2]: basis for place, basis in zip(present, bases, strict=True)}
    for key, leader in leaders.items():
        if (leader, "output") in found:
            # A copy, since snapshots are files of tensors that share nothing.
            found[key, "output"] = found[leader, "output"].clone()
    return {
        key: _empty_block(key, total, found.get((key, "output")), found.get((key, "input")))
        for key, total in factors.items()
    }


def _empty_block(
    key: BlockKey, total: Covariances, output_basis: Tensor | None, input_basis: Tensor | None
) -> Block:
    if input_basis is not None:
        # Rows of the eigenvectors are reordered, rather than both sides of the matrix before.
        input_basis = total.form.columns_of(input_basis.mT, leading=_leading(key)).mT
    eigenvalues = total.template.new_zeros(total.shape)
    return Block(key.parameters, output_basis, input_basis, eigenvalues, total.form.transposed)


def add_eigenvalues(
    portion: Portion, done: int, block: Block, follower: Block | None = None
) -> Iterator[None]:
    """Add a portion's squared per-example gradients, in its block's basis, to the eigenvalues.

    The additions (see `in_pieces`) are one for all output vectors where gradients are outer
    products, and otherwise one for each.

    Args:
        portion: The examples.
        done: Number of additions that have been made.
        block: Its block.
        follower: The block of a bias that follows the block's weight, in the same basis.
    """
    factors = portion.plan.form.factors
    if factors is Factors.OUTER_PRODUCTS:
        if done == 0:
            _add_outer_products(portion, block, follower)
            yield
    elif factors is Factors.LOOKUP:
        indices = portion.activations()[0, :, :, 0]
        for gradients in portion.gradients(done):
            rotated = kronecker.rotate(gradients, block.gradient_basis)[0]
            squares = kronecker.squared_lookups(rotated, indices, block.eigenvalues.shape[2])
            block.eigenvalues.add_(squares.mT)
            yield
    else:
        for gradients in portion.example_gradients(done):
            squares = kronecker.squared_entries(
                gradients, block.gradient_basis, block.activation_basis
            )
            check_finite(squares.sum(), f"gradients of {portion.label!r}")
            block.eigenvalues.add_(squares)
            yield


def _add_outer_products(portion: Portion, block: Block, follower: Block | None) -> None:
    activations, basis = portion.activations(), block.activation_basis
    if basis is not None:
        leading = _leading(portion.plan.key)
        basis = portion.plan.form.features_of(basis.mT, leading=leading).mT
    if follower is not None:
        squares = squared_rotations(portion.gradients(), block.gradient_basis)
        if squares is not None:
            inputs = kronecker.rotate(activations, basis)
            product = single_position_product(squares, inputs.square())
            # Both are made before one is added, as no more than the whole may fail.
            of_bias = squares.sum(dim=(1, 2))[..., None]
            block.eigenvalues.add_(product)
            follower.eigenvalues.add_(of_bias)
        return
    _, d_out, d_in = block.eigenvalues.shape
    route = cheapest_route(activations.shape[2], d_out, d_in, portion.num_vectors)
    total = squared_projections(
        portion.gradients(), activations, block.gradient_basis, basis, route, portion.max_bytes
    )
    if total is not None:
        block.eigenvalues.add_(total)


def _leading(key: BlockKey) -> int:
    """Columns in front of the weight's: one in a joint block."""
    return int(key.bias is not None)


def _kept_gradients(portion: Portion, first: int) -> Iterator[Tensor]:
    """Yield output gradients, with zeros where an embedding looks up its padding."""
    if portion.plan.form.factors is not Factors.LOOKUP:
        yield from portion.gradients(first)
        return
    kept = portion.activations() >= 0
    for gradients in portion.gradients(first):
        yield gradients * kept


def _add_rows_and_columns(portion: Portion, done: int, total: Covariances) -> Iterator[None]:
    """Add `Σ G Gᵀ` and `Σ Gᵀ G`, of which the vectors are the columns and the rows of G."""
    what = f"gradients of {portion.label!r}"
    sides = total.form.output_basis + total.form.input_basis
    if not sides:
        return
    first, begun = divmod(done, sides)
    for gradients in portion.example_gradients(first):
        if total.form.output_basis and not begun:
            total.add_outputs(gradients.mT, what)
            yield
        if total.form.input_basis:
            total.add_inputs(gradients, what)
            yield
        begun = 0
