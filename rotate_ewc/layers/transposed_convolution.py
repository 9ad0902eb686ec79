"""`conv_transpose1d`, `conv_transpose2d` and `conv_transpose3d`.

A transposed convolution multiplies each input position's channels with the weight and adds the
result to a window of the output. So the shared positions are those of the *input*, and the output
side of the weight is a window: (output channels of a group, kernel).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from einops import rearrange, reduce
from torch import Tensor

from rotate_ewc.layers.base import FactoredCall, Factors, Form, IsParameter, Rule
from rotate_ewc.layers.windows import IntOrTuple, numbered, per_axis, windows


@dataclass(frozen=True)
class TransposedConvolutionCall(FactoredCall):
    """A transposed convolution over `len(stride)` spatial axes.

    Attributes:
        kernel: Size of the kernel along each spatial axis.
        stride: Distance between the windows of neighbouring input positions.
        padding: What is cut off (or, negative, added) before and after each spatial axis.
        dilation: Distance between kernel elements along each spatial axis.
    """

    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()

    # The bias is added once at every output position, not once for every window over it.
    joins_bias: ClassVar[bool] = False

    @property
    def batch_axes(self) -> tuple[int, ...]:
        """The first axis; an input without a batch axis has none."""
        return (0,) if self.input.ndim == len(self.kernel) + 2 else ()

    @property
    def weight_form(self) -> Form:
        """The weight comes as `[input channels, output channels of a group, *kernel]`."""
        return Form(Factors.OUTER_PRODUCTS, self.groups, transposed=True, activation_basis=True)

    def elements(self, output_shape: Sequence[int]) -> int:
        """Every input position has a window of outputs."""
        channels = self.input.shape[1]
        window = output_shape[1] * math.prod(self.kernel)
        return self.input.numel() // channels * (window + channels)

    def activations(self, inputs: Tensor) -> Tensor:
        """Lay out the input's channels as `[groups, n, shared, d_in]`."""
        return rearrange(inputs.flatten(3), "n t (g c) s -> g n (t s) c", g=self.groups)

    def gradients(self, output_gradients: Tensor) -> Tensor:
        """Cut the output's gradient into windows: `[groups, n, shared, d_out]`."""
        cut = windows(
            output_gradients.flatten(0, 1), self.kernel, self.stride, self.dilation, self.padding
        )
        positions, offsets = numbered("o", len(self.kernel)), numbered("k", len(self.kernel))
        return rearrange(
            cut,
            f"(n t) {positions} {offsets} (g c) -> g n (t {positions}) (c {offsets})",
            n=len(output_gradients),
            g=self.groups,
        )

    def bias_gradients(self, output_gradients: Tensor) -> Tensor:
        """Sum the output's gradient over positions."""
        return reduce(output_gradients, "n t c ... -> n c", "sum")


def transposed_convolution(spatial_axes: int) -> Rule:
    """Return the reader of the arguments of `torch.conv_transpose1d` and its relatives."""

    def read(
        _: IsParameter,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: IntOrTuple = 1,
        padding: IntOrTuple = 0,
        output_padding: IntOrTuple = 0,
        groups: int = 1,
        dilation: IntOrTuple = 1,
    ) -> TransposedConvolutionCall:
        extra = per_axis(output_padding, spatial_axes)
        # Output rows that were added behind lie beyond every window, and are cut off again.
        around = zip(per_axis(padding, spatial_axes), extra, strict=True)
        return TransposedConvolutionCall(
            input,
            weight,
            bias,
            groups,
            kernel=tuple(weight.shape[2:]),
            stride=per_axis(stride, spatial_axes),
            padding=tuple((zeros, zeros - added) for zeros, added in around),
            dilation=per_axis(dilation, spatial_axes),
        )

    return read
