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
    """Cut images into the windows a kernel sees: a view of the padded images.

    Channels are laid out last, so that what neighbouring columns of a window hold lies together,
    and copying windows moves long runs of numbers rather than single ones.

    Args:
        images: `[batch, channels, *spatial]`.
        kernel: Size of the kernel along each spatial axis.
        stride: Step between windows along each spatial axis.
        dilation: Distance between kernel elements along each spatial axis.
        padding: Zeros before and after each spatial axis; negative numbers cut off.

    Returns:
        `[batch, *positions, *kernel, channels]`.
    """
    around = [zeros for pair in reversed(padding) for zeros in pair]
    padded = F.pad(images.movedim(1, -1), [0, 0, *around]).contiguous()
    sizes = [
        (size - d * (k - 1) - 1) // step + 1
        for size, k, step, d in zip(padded.shape[1:-1], kernel, stride, dilation, strict=True)
    ]
    memory_steps = padded.stride()[1:-1]
    return padded.as_strided(
        (len(padded), *sizes, *kernel, padded.shape[-1]),
        (
            padded.stride(0),
            *(m * step for m, step in zip(memory_steps, stride, strict=True)),
            *(m * d for m, d in zip(memory_steps, dilation, strict=True)),
            1,
        ),
    )


def numbered(prefix: str, count: int) -> str:
    """Return `count` axis names for an einops pattern: `"o0 o1"`."""
    return " ".join(f"{prefix}{axis}" for axis in range(count))
