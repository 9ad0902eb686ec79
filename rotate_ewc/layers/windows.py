"""Sliding windows over spatial axes, and the arguments that convolutions share."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

IntOrTuple = int | Sequence[int]


def per_axis(value: IntOrTuple, axes: int) -> tuple[int, ...]:
    """Spell out an argument that may be one number for all spatial axes."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * axes if len(values) == 1 else values


def windows(
    images: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[tuple[int, int]],
) -> Tensor:
    """Cut images into the windows a kernel sees: a view of the padded images, where possible.

    Args:
        images: `[batch, channels, *spatial]`.
        kernel: Size of the kernel along each spatial axis.
        stride: Step between windows along each spatial axis.
        dilation: Distance between kernel elements along each spatial axis.
        padding: Zeros before and after each spatial axis; negative numbers cut off.

    Returns:
        `[batch, channels, *positions, *kernel]`.
    """
    padded = F.pad(images, [p for pair in reversed(padding) for p in pair])
    sizes = [
        (size - d * (k - 1) - 1) // step + 1
        for size, k, step, d in zip(padded.shape[2:], kernel, stride, dilation, strict=True)
    ]
    memory_steps = padded.stride()[2:]
    return padded.as_strided(
        (*padded.shape[:2], *sizes, *kernel),
        (
            *padded.stride()[:2],
            *(m * step for m, step in zip(memory_steps, stride, strict=True)),
            *(m * d for m, d in zip(memory_steps, dilation, strict=True)),
        ),
        padded.storage_offset(),
    )


def numbered(prefix: str, count: int) -> str:
    """Return `count` axis names for an einops pattern: `"o0 o1"`."""
    return " ".join(f"{prefix}{axis}" for axis in range(count))
