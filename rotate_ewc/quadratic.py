"""The quadratic form of a list of blocks, with the four products that value and gradient need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rotate_ewc import kernels
from rotate_ewc.block import Block


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
            rotated = _rotated(block, by_name)
            weighted.append(block.eigenvalues * rotated)
            values.append(torch.dot(weighted[-1].flatten(), rotated.flatten()))
        return torch.stack(values).sum(), *weighted

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.blocks, tensors = inputs[0], inputs[1:]
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output[1:], *tensors)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        grad_output = grad_outputs[0]
        blocks: Sequence[Block] = ctx.blocks
        saved = ctx.saved_tensors
        tensors = saved[len(blocks) :]
        by_name = _by_name(blocks, tensors)
        gradients: list[Tensor] = []
        for index, block in enumerate(blocks):
            weighted = saved[index]
            if torch.is_grad_enabled():
                # A second derivative is wanted: start again from the tensors, differentiably.
                weighted = block.eigenvalues * _rotated(block, by_name)
            product = kernels.from_eigenbasis(
                weighted, block.gradient_basis, block.activation_basis
            )
            product = product * (2 * grad_output)
            for name, part in zip(block.parameters, block.parts(product), strict=True):
                gradients.append(part.reshape(by_name[name].shape).to(by_name[name].dtype))
        return None, *gradients


def _rotated(block: Block, tensors: Mapping[str, Tensor]) -> Tensor:
    matrix = block.matrix(tensors).to(block.eigenvalues.dtype)
    return kernels.to_eigenbasis(matrix, block.gradient_basis, block.activation_basis)


def _by_name(blocks: Sequence[Block], tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    return dict(zip(_names(blocks), tensors, strict=True))


def _names(blocks: Sequence[Block]) -> list[str]:
    return [name for block in blocks for name in block.parameters]
