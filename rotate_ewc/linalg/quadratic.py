"""The quadratic form of a list of blocks, with the four products that value and gradient need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rotate_ewc.linalg.block import Block, shapes_of


def quadratic_form(blocks: Sequence[Block], tensors: Mapping[str, Tensor]) -> Tensor:
    """Return `dᵀ F d` for parameter-shaped tensors d, differentiable in d (also twice).

    Two products for each block give the value, two more the gradient; autograd through a product
    with F would take eight.

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
        products.update(block.unrotate(block.spectrum * block.rotate(tensors), shapes))
    return products


class _QuadraticForm(torch.autograd.Function):
    """`Δ̃ = Q_gᵀ Δ Q_a`, value `Σ Λ ∘ Δ̃²`, gradient `2 Q_g (Λ ∘ Δ̃) Q_aᵀ`.

    Besides the value, `Λ ∘ Δ̃` of every block is returned, only to be saved for the gradient.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(blocks: Sequence[Block], *tensors: Tensor) -> tuple[Tensor, ...]:
        by_name = _by_name(blocks, tensors)
        values, weighted = [], []
        for block in blocks:
            rotated = block.rotate(by_name)
            weighted.append(block.spectrum * rotated)
            values.append(torch.dot(weighted[-1].flatten(), rotated.flatten()))
        return torch.stack(values).sum(), *weighted

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.blocks, tensors = inputs[0], inputs[1:]
        ctx.mark_non_differentiable(*output[1:])
        # Else the gradients of what is not differentiable would be filled with zeros.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output[1:], *tensors)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        blocks: Sequence[Block] = ctx.blocks
        saved = ctx.saved_tensors
        tensors = saved[len(blocks) :]
        if grad_outputs[0] is None:
            return None, *(None for _ in tensors)
        factor = 2 * grad_outputs[0]
        by_name = _by_name(blocks, tensors)
        shapes = shapes_of(by_name)
        gradients: list[Tensor] = []
        for index, block in enumerate(blocks):
            weighted = saved[index]
            if torch.is_grad_enabled():
                # A second derivative is wanted: start again from the tensors, differentiably.
                weighted = block.spectrum * block.rotate(by_name)
            # Autograd casts them to the tensors' dtypes.
            products = block.unrotate(weighted, shapes).values()
            gradients.extend(product * factor for product in products)
        return None, *gradients


def _by_name(blocks: Sequence[Block], tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    return dict(zip(_names(blocks), tensors, strict=True))


def _names(blocks: Sequence[Block]) -> list[str]:
    return [name for block in blocks for name in block.parameters]
