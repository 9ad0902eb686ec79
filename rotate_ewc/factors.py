"""From portions of observations to Kronecker factors, bases and eigenvalues, for each form."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rotate_ewc import kernels
from rotate_ewc.block import Block
from rotate_ewc.layers import Factors, Form
from rotate_ewc.observation import Portion
from rotate_ewc.plan import BlockKey


@dataclass
class Covariances:
    """The two Kronecker factors of one block, summed over the data.

    Attributes:
        form: How the block is made.
        shape: `(groups, d_out, d_in)`.
        template: An empty tensor of the statistics' dtype and device.
        output: `[groups, d_out, d_out]`; None if that side has no basis.
        input: `[groups, d_in, d_in]`; None likewise.
    """

    form: Form
    shape: tuple[int, int, int]
    template: Tensor
    output: Tensor | None = None
    input: Tensor | None = None

    @classmethod
    def of(cls, portion: Portion) -> Covariances:
        """Begin the factors of the block that a portion belongs to."""
        form, key = portion.plan.form, portion.plan.key
        parameter = portion.observation.parameters[key.weight]
        groups, d_out, d_in = form.shape(parameter.shape)
        shape = (groups, d_out, d_in + (key.bias is not None))
        return cls(form, shape, parameter.new_empty(0, dtype=portion.dtype))


def add_covariances(portion: Portion, total: Covariances, *, reduce: bool) -> None:
    """Add a portion's examples to the Kronecker factors of its block.

    Args:
        portion: The examples.
        total: The factors so far.
        reduce: Whether shared positions are summed before they enter (`KFACType.REDUCE`).

    Raises:
        ValueError: If a number is not finite.
    """
    factors, label = total.form.factors, portion.plan.key.label
    if factors is Factors.NONE:
        if total.form.output_basis or total.form.input_basis:
            _add_partial_traces(portion, total)
        return
    if factors is Factors.OUTER_PRODUCTS and portion.observation.first:
        inputs = portion.activations()
        inputs = inputs.mean(dim=2, keepdim=True) if reduce else inputs
        covariance = kernels.covariance_sum(inputs)
        total.input = _sum(total.input, covariance, f"layer inputs of {label!r}")
        del inputs
    for gradients in _kept_gradients(portion):
        vectors = gradients.sum(dim=2, keepdim=True) if reduce else gradients
        covariance = kernels.covariance_sum(vectors)
        total.output = _sum(total.output, covariance, f"output gradients of {label!r}")


def empty_block(key: BlockKey, covariances: Covariances) -> Block:
    """Decompose the factors; the eigenvalues are still to be summed."""
    gradient_basis, activation_basis = (
        None if covariance is None else kernels.eigenbasis(covariance)
        for covariance in (covariances.output, covariances.input)
    )
    eigenvalues = covariances.template.new_zeros(covariances.shape)
    return Block(
        key.parameters, gradient_basis, activation_basis, eigenvalues, covariances.form.transposed
    )


def add_eigenvalues(portion: Portion, block: Block) -> None:
    """Add a portion's squared per-example gradients, in its block's basis, to the eigenvalues."""
    factors = portion.plan.form.factors
    if factors is Factors.OUTER_PRODUCTS:
        _add_outer_products(portion, block)
    elif factors is Factors.LOOKUP:
        indices = portion.activations()[0, :, :, 0]
        for gradients in portion.gradients():
            rotated = kernels.rotate(gradients, block.gradient_basis)[0]
            squares = kernels.squared_lookups(rotated, indices, block.eigenvalues.shape[2])
            block.eigenvalues.add_(squares.mT)
    else:
        for gradients in portion.example_gradients():
            squares = kernels.squared_entries(
                gradients, block.gradient_basis, block.activation_basis
            )
            _check_finite(squares, f"gradients of {portion.plan.key.label!r}")
            block.eigenvalues.add_(squares)


def _add_outer_products(portion: Portion, block: Block) -> None:
    inputs = kernels.rotate(portion.activations(), block.activation_basis)
    if inputs.shape[2] > 1:
        for gradients in portion.gradients():
            rotated = kernels.rotate(gradients, block.gradient_basis)
            squares = kernels.squared_projections(rotated, inputs, portion.max_bytes)
            block.eigenvalues.add_(squares)
        return
    # With one position, the squares of all vectors can be summed before the one product.
    total: Tensor | None = None
    for gradients in portion.gradients():
        squares = kernels.rotate(gradients, block.gradient_basis).square_()
        total = squares if total is None else total.add_(squares)
    if total is not None:
        block.eigenvalues.add_(kernels.single_position_product(total, inputs.square_()))


def _kept_gradients(portion: Portion) -> Iterator[Tensor]:
    """Yield output gradients, with zeros where an embedding looks up its padding."""
    if portion.plan.form.factors is not Factors.LOOKUP:
        yield from portion.gradients()
        return
    kept = portion.activations() >= 0
    for gradients in portion.gradients():
        yield gradients * kept


def _add_partial_traces(portion: Portion, total: Covariances) -> None:
    what = f"gradients of {portion.plan.key.label!r}"
    for gradients in portion.example_gradients():
        if total.form.output_basis:
            trace = kernels.output_partial_trace(gradients)
            total.output = _sum(total.output, trace, what)
        if total.form.input_basis:
            trace = kernels.input_partial_trace(gradients)
            total.input = _sum(total.input, trace, what)


def _sum(total: Tensor | None, addition: Tensor, what: str) -> Tensor:
    # A sum of squares is finite only if every number in it is.
    _check_finite(addition.diagonal(dim1=1, dim2=2), what)
    return addition if total is None else total.add_(addition)


def _check_finite(squares: Tensor, what: str) -> None:
    if not bool(torch.isfinite(squares.sum())):
        raise ValueError(f"the {what} are not finite (NaN, infinity, or overflow when squared)")
