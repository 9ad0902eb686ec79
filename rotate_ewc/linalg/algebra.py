"""What can be computed of a list of blocks: products, diagonal, functions, samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Generator, Tensor

from rotate_ewc._utils.messages import quoted
from rotate_ewc.linalg.block import Block

Shapes = Mapping[str, torch.Size]


def multiply(blocks: Sequence[Block], columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Multiply tensors `[K, *shape]`, by parameter name, each in the dtype of its block."""
    product: dict[str, Tensor] = {}
    shapes = {name: tensor.shape[1:] for name, tensor in columns.items()}
    for block in blocks:
        matrix = block.gather(columns, columns=True).to(block.eigenvalues.dtype)
        for name, part in block.split(block.multiply(matrix), shapes).items():
            product[name] = part.to(columns[name].dtype)
    return product


def diagonal(blocks: Sequence[Block], shapes: Shapes) -> dict[str, Tensor]:
    """Return the diagonal over the parameters themselves, by name, in the parameters' shapes."""
    found: dict[str, Tensor] = {}
    for block in blocks:
        found.update(block.split(block.diagonal_in(None, None), shapes))
    return found


def apply(function: Callable[[Tensor], Tensor], blocks: Sequence[Block]) -> list[Block]:
    """Return the blocks with a function of their eigenvalues, checked.

    Raises:
        ValueError: If the function changes the shape, or returns what is negative or not finite.
        TypeError: If it is no function, or does not return a tensor.
    """
    if not callable(function):
        raise TypeError(f"function is {function!r}; expected a function from tensor to tensor")
    return [block.with_eigenvalues(_applied(function, block)) for block in blocks]


def check_positive(blocks: Sequence[Block], damping: float) -> None:
    """Raise if a block is singular in spite of the damping that was added."""
    singular = [block.label for block in blocks if not bool((block.eigenvalues > 0).all())]
    if singular:
        raise ValueError(
            f"damping is {damping}, but the block of {quoted(singular)} is singular; expected "
            f"damping greater than 0"
        )


def sample(
    blocks: Sequence[Block], shapes: Shapes, num_samples: int, generator: Generator | None
) -> dict[str, Tensor]:
    """Draw from the normal distribution with covariance F², for F made of the blocks.

    Returns:
        By parameter name, `[num_samples, *shape]`.
    """
    draws: dict[str, Tensor] = {}
    for block in blocks:
        like = block.spectrum
        noise = torch.randn(
            (num_samples, *like.shape), generator=generator, device=like.device, dtype=like.dtype
        )
        # Noise is as normal in the eigenbasis as it would be after a rotation into it.
        draws.update(block.unrotate(noise * like, shapes))
    return draws


def _applied(function: Callable[[Tensor], Tensor], block: Block) -> Tensor:
    # A copy, for functions that work in place.
    values = function(block.eigenvalues.clone())
    what = f"the function of the eigenvalues of {block.label!r} returned"
    if not isinstance(values, Tensor):
        raise TypeError(f"{what} {type(values).__name__}; expected a tensor")
    if values.dtype != block.eigenvalues.dtype:
        raise ValueError(f"{what} dtype {values.dtype}; expected {block.eigenvalues.dtype}")
    if values.shape != block.eigenvalues.shape:
        raise ValueError(
            f"{what} shape {list(values.shape)}; expected {list(block.eigenvalues.shape)}"
        )
    if not bool((torch.isfinite(values) & (values >= 0)).all()):
        raise ValueError(
            f"{what} values that are negative or not finite; expected finite ones of at least 0 "
            f"(add damping first?)"
        )
    return values
