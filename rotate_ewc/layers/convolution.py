"""`conv1d`, `conv2d` and `conv3d` with stride, padding, dilation and groups.

Every padding mode arrives here as an ordinary convolution: modules with circular, reflecting or
replicating padding pad the input first, and it is the padded input that the operation sees.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from einops import rearrange
from torch import Tensor

from rotate_ewc.layers.base import FactoredCall, Factors, Form, IsParameter, Rule
from rotate_ewc.layers.windows import IntOrTuple, numbered, per_axis, windows


@dataclass(frozen=True)
class ConvolutionCall(FactoredCall):
    """A convolution over `len(stride)` spatial axes.

    Attributes:
        kernel: Size of the kernel along each spatial axis.
        stride: Step of the kernel along each spatial axis.
        padding: Zeros added before and after each spatial axis.
        dilation: Distance between kernel elements along each spatial axis.
    """

    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()

    @property
    def batch_axes(self) -> tuple[int, ...]:
        """The first axis; an input without a batch axis has none."""
        return (0,) if self.input.ndim == len(self.kernel) + 2 else ()

    @property
    def weight_form(self) -> Form:
        """Both sides get a basis; the input's features are windows."""
        window = math.prod(self.kernel)
        return Form(Factors.OUTER_PRODUCTS, self.groups, activation_basis=True, window=window)

    def elements(self, output_shape: Sequence[int]) -> int:
        """Every output position has a window of inputs."""
        channels = output_shape[1]
        window = self.input.shape[1] * math.prod(self.kernel)
        return math.prod(output_shape) // channels * (window + channels)

    def activations(self, inputs: Tensor) -> Tensor:
        """Cut the input into windows: `[groups, n, shared, d_in]`.

        `shared` runs over output positions, `d_in` over (kernel, input channels of a group).
        """
        cut = windows(inputs.flatten(0, 1), self.kernel, self.stride, self.dilation, self.padding)
        positions, offsets = numbered("o", len(self.kernel)), numbered("k", len(self.kernel))
        return rearrange(
            cut,
            f"(n t) {positions} {offsets} (g c) -> g n (t {positions}) ({offsets} c)",
            n=len(inputs),
            g=self.groups,
        )

    def gradients(self, output_gradients: Tensor) -> Tensor:
        """Lay out the output's gradient as `[groups, n, shared, d_out]`."""
        by_position = output_gradients.flatten(3)
        return rearrange(by_position, "n t (g o) s -> g n (t s) o", g=self.groups)


def convolution(spatial_axes: int) -> Rule:
    """Return the reader of the arguments of `torch.conv1d`, `conv2d` or `conv3d`."""

    def read(
        _: IsParameter,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: IntOrTuple = 1,
        padding: IntOrTuple | str = 0,
        dilation: IntOrTuple = 1,
        groups: int = 1,
    ) -> ConvolutionCall:
        kernel, dilations = tuple(weight.shape[2:]), per_axis(dilation, spatial_axes)
        return ConvolutionCall(
            input,
            weight,
            bias,
            groups,
            kernel=kernel,
            stride=per_axis(stride, spatial_axes),
            padding=_zeros_around(padding, kernel, dilations),
            dilation=dilations,
        )

    return read


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
    return tuple((zeros, zeros) for zeros in per_axis(padding, len(kernel)))
