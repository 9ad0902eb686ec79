"""Tensors that have grown since they were remembered, as the outputs of a classifier do."""

import torch
from torch import Tensor


def leading(tensor: Tensor, shape: torch.Size, name: str) -> Tensor:
    """Return the part of a tensor that was there when it was remembered.

    Args:
        tensor: What it is now.
        shape: What its shape was.
        name: Names it in errors.

    Raises:
        ValueError: If it has shrunk, or changed its number of axes.
    """
    if tensor.shape == shape:
        return tensor
    pairs = list(zip(tensor.shape, shape, strict=False))
    if tensor.ndim != len(shape) or any(now < then for now, then in pairs):
        raise ValueError(
            f"{name!r} has shape {list(tensor.shape)}; expected at least {list(shape)}, as it was "
            f"when it was last protected"
        )
    return tensor[tuple(slice(size) for size in shape)]


def grown(tensor: Tensor, shape: torch.Size) -> Tensor:
    """Pad a remembered tensor with zeros at the ends of its axes."""
    if tensor.shape == shape:
        return tensor
    padded = tensor.new_zeros(shape)
    padded[tuple(slice(size) for size in tensor.shape)] = tensor
    return padded
