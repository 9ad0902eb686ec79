"""The quadratic form of a list of blocks, with the four products that value and gradient need."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rotate_ewc.linalg.block import Block, shapes_of


def quadratic_form(blocks: Sequence[Block], tensors: Mapping[str, Tensor]) -> Tensor:
    """Return `dᵀ F d` for parameter-shaped tensors d, differentiable in d (also twice).

    Two products for each block give the value, two more the gradient; autograd through a product
    with F would take eight. Thin blocks have products of their kept directions alone.

    Args:
        blocks: The blocks of F.
        tensors: d by parameter name.

    Returns:
        A scalar tensor in the blocks' dtype.
    """
    value: Tensor = _QuadraticForm.apply(blocks, *(tensors[name] for name in _names(blocks)))[0]
    return value


def quadratic_gradient(blocks: Sequence[Block], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `F d` by parameter name, in the parameters' shapes and the blocks' dtypes.

    Args:
        blocks: The blocks of F.
        tensors: d by parameter name.
    """
    products: dict[str, Tensor] = {}
    shapes = shapes_of(tensors)
    for block in blocks:
        products.update(block.split(block.multiply(_gathered(block, tensors)), shapes))
    return products


class _QuadraticForm(torch.autograd.Function):
    """`Δ̃ = Q_gᵀ Δ Q_a`, value `Σ Λ ∘ Δ̃²`, gradient `2 Q_g (Λ ∘ Δ̃) Q_aᵀ`.

    Besides the value, `Λ ∘ Δ̃` of every block is returned, only to be saved for the gradient; of a
    thin block, what its `ThinProducts` have in its place.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(blocks: Sequence[Block], *tensors: Tensor) -> tuple[Tensor, ...]:
        by_name = _by_name(blocks, tensors)
        values: list[Tensor] = []
        parts: list[Tensor] = []
        for block in (one.restored for one in blocks):
            if block.products is not None:
                value, of_block = block.products.form(_gathered(block, by_name))
                values.append(value.sum())
                parts.extend(of_block)
                continue
            rotated = block.rotate(by_name)
            parts.append(block.spectrum * rotated)
            values.append(_inner(parts[-1], rotated, block.transposed))
        return torch.stack(values).sum(), *parts

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.blocks, tensors = inputs[0], inputs[1:]
        ctx.mark_non_differentiable(*output[1:])
        # Else the gradients of what is not differentiable would be filled with zeros.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output[1:])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        blocks: Sequence[Block] = ctx.blocks
        count = len(_names(blocks))
        tensors, parts = ctx.saved_tensors[:count], iter(ctx.saved_tensors[count:])
        if grad_outputs[0] is None:
            return None, *(None for _ in tensors)
        factor = 2 * grad_outputs[0]
        by_name = _by_name(blocks, tensors)
        shapes = shapes_of(by_name)
        gradients: list[Tensor] = []
        for block in (one.restored for one in blocks):
            # Autograd casts them to the tensors' dtypes.
            products = block.split(_product(block, by_name, parts), shapes).values()
            gradients.extend(product * factor for product in products)
        return None, *gradients


def _product(block: Block, tensors: Mapping[str, Tensor], parts: Iterator[Tensor]) -> Tensor:
    """Return F Δ of a block, from what the value has left of it."""
    if block.products is None:
        weighted = next(parts)
        if torch.is_grad_enabled():
            # A second derivative is wanted: start again from the tensors, differentiably.
            weighted = block.spectrum * block.rotate(tensors)
        return block.from_eigenbasis(weighted)
    own = next(parts), next(parts)
    matrix = _gathered(block, tensors)
    if torch.is_grad_enabled():
        own = block.products.form(matrix)[1]
    return block.products.product(matrix, own)


def _inner(first: Tensor, second: Tensor, transposed: bool) -> Tensor:
    """Return the inner product of matrices that lie in memory as those of a block do."""
    if transposed:
        first, second = first.mT, second.mT
    return torch.dot(first.flatten(), second.flatten())


def _gathered(block: Block, tensors: Mapping[str, Tensor]) -> Tensor:
    return block.gather(tensors).to(block.eigenvalues.dtype)


def _by_name(blocks: Sequence[Block], tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    return dict(zip(_names(blocks), tensors, strict=True))


def _names(blocks: Sequence[Block]) -> list[str]:
    return [name for block in blocks for name in block.parameters]
