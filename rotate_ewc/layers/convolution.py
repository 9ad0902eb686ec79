"""`conv1d`, `conv2d` and `conv3d` with stride, padding, dilation and groups.

Every padding mode arrives here as an ordinary convolution: modules with circular, reflecting or
replicating padding pad the input first, and it is the padded input that the operation sees.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from rotate_ewc.layers.base import LayerCall

IntOrTuple = int | Sequence[int]


@dataclass(frozen=True)
class ConvolutionCall(LayerCall):
    """A convolution over `len(stride)` spatial axes.

    Attributes:
        stride: Step of the kernel along each spatial axis.
        padding: Zeros added before and after each spatial axis.
        dilation: Distance between kernel elements along each spatial axis.
    """

    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()

    @property
    def batch_axes(self) -> tuple[int, ...]:
        """The first axis; an input without a batch axis has none."""
        return (0,) if self.input.ndim == len(self.stride) + 2 else ()

    def activations(self, layer_input: Tensor, num_examples: int, batch_axis: int) -> Tensor:
        """Cut the input into windows: `[groups, num_examples, shared, d_in]`.

        `shared` runs over output positions, `d_in` over (input channels of a group, kernel).
        """
        kernel = self.weight.shape[2:]
        padded = F.pad(layer_input, [p for pair in reversed(self.padding) for p in pair])
        sizes = [
            (size - d * (k - 1) - 1) // step + 1
            for size, k, step, d in zip(
                padded.shape[2:], kernel, self.stride, self.dilation, strict=True
            )
        ]
        memory_steps = padded.stride()[2:]
        windows = padded.as_strided(
            (*padded.shape[:2], *sizes, *kernel),
            (
                *padded.stride()[:2],
                *(m * step for m, step in zip(memory_steps, self.stride, strict=True)),
                *(m * d for m, d in zip(memory_steps, self.dilation, strict=True)),
            ),
            padded.storage_offset(),
        )
        positions = " ".join(f"o{axis}" for axis in range(len(sizes)))
        offsets = " ".join(f"k{axis}" for axis in range(len(sizes)))
        return rearrange(
            windows,
            f"(n t) (g c) {positions} {offsets} -> g n (t {positions}) (c {offsets})",
            n=num_examples,
            g=self.groups,
        )

    def gradients(self, output_gradient: Tensor, num_examples: int, batch_axis: int) -> Tensor:
        """Lay out the output's gradient as `[groups, num_examples, shared, d_out]`."""
        by_position = output_gradient.flatten(2)
        return rearrange(by_position, "(n t) (g o) s -> g n (t s) o", n=num_examples, g=self.groups)


def convolution(spatial_axes: int) -> Callable[..., ConvolutionCall]:
    """Return the reader of the arguments of `torch.conv1d`, `conv2d` or `conv3d`."""

    def read(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: IntOrTuple = 1,
        padding: IntOrTuple | str = 0,
        dilation: IntOrTuple = 1,
        groups: int = 1,
    ) -> ConvolutionCall:
        dilations = _per_axis(dilation, spatial_axes)
        return ConvolutionCall(
            input,
            weight,
            bias,
            groups,
            stride=_per_axis(stride, spatial_axes),
            padding=_zeros_around(padding, weight.shape[2:], dilations),
            dilation=dilations,
        )

    return read


def _per_axis(value: IntOrTuple, axes: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * axes if len(values) == 1 else values


def _zeros_around(
    padding: IntOrTuple | str, kernel: Sequence[int], dilation: tuple[int, ...]
) -> tuple[tuple[int, int], ...]:
    """Zeros before and after each axis; `"same"` puts the odd one behind, as torch does."""
    if padding == "valid":
        return ((0, 0),) * len(kernel)
    if padding == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    if isinstance(padding, str):
        raise ValueError(f"padding is {padding!r}; expected 'same', 'valid' or integers")
    return tuple((zeros, zeros) for zeros in _per_axis(padding, len(kernel)))
