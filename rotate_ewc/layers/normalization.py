"""Normalization layers: their scale and shift, after a normalization without parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rotate_ewc.layers.base import IsParameter
from rotate_ewc.layers.elementwise import ElementwiseCall


def layer_norm(
    _: IsParameter,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> ElementwiseCall:
    """Read the arguments of `torch.nn.functional.layer_norm`."""
    del cudnn_enable
    view = tuple(normalized_shape)
    normalize = partial(F.layer_norm, normalized_shape=view, eps=eps)
    return ElementwiseCall(input, weight, bias, view=view, normalize=normalize)


def rms_norm(
    _: IsParameter,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> ElementwiseCall:
    """Read the arguments of `torch.nn.functional.rms_norm`."""
    # Where eps is left out, it is that of the dtype in which the layer computes.
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    view = tuple(normalized_shape)
    normalize = partial(F.rms_norm, normalized_shape=view, eps=eps)
    return ElementwiseCall(input, weight, None, view=view, normalize=normalize)


def group_norm(
    _: IsParameter,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> ElementwiseCall:
    """Read the arguments of `torch.nn.functional.group_norm`."""
    del cudnn_enabled
    normalize = partial(F.group_norm, num_groups=num_groups, eps=eps)
    return ElementwiseCall(input, weight, bias, view=_channels(input), normalize=normalize)


def batch_norm(
    _: IsParameter,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> ElementwiseCall:
    """Read the arguments of `torch.nn.functional.batch_norm`."""
    del momentum
    if training:
        raise ValueError(
            "a BatchNorm layer normalizes with the statistics of the batch, so that examples are "
            "not independent; expected eval mode and running statistics"
        )
    statistics = {"running_mean": running_mean, "running_var": running_var}
    normalize = partial(_with_statistics, F.batch_norm, statistics, eps=eps)
    return ElementwiseCall(input, weight, bias, view=_channels(input), normalize=normalize)


def instance_norm(
    _: IsParameter,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> ElementwiseCall:
    """Read the arguments of `torch.nn.functional.instance_norm`."""
    del momentum
    if use_input_stats and running_mean is not None:
        raise ValueError(
            "an InstanceNorm layer updates its running statistics; expected eval mode, in which it "
            "only reads them"
        )
    statistics = {"running_mean": running_mean, "running_var": running_var}
    normalize = partial(
        _with_statistics, F.instance_norm, statistics, use_input_stats=use_input_stats, eps=eps
    )
    return ElementwiseCall(input, weight, bias, view=_channels(input), normalize=normalize)


def _with_statistics(
    function: Callable[..., Tensor],
    statistics: Mapping[str, Tensor | None],
    images: Tensor,
    **options: Any,
) -> Tensor:
    """Call a normalization with running statistics in the dtype of its input."""
    same = {name: None if t is None else t.to(images.dtype) for name, t in statistics.items()}
    return function(images, **same, **options)


def _channels(images: Tensor) -> tuple[int, ...]:
    """The shape of one number for each channel, against `[batch, channels, *spatial]`."""
    return (images.shape[1], *(1 for _ in images.shape[2:]))
