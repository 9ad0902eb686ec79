"""Dtypes in which statistics are computed, and numbers that these cannot hold."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from rotate_ewc._utils.tree import tensors_in
from rotate_ewc.errors import NotFiniteError

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def full_precision(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Make a function compute in its arguments' own dtype, also inside `torch.autocast`."""

    @wraps(function)
    def wrapped(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        first = next(tensors_in((args, kwargs)), None)
        with nullcontext() if first is None else without_autocast(first.device):
            return function(*args, **kwargs)

    return wrapped


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Let tensors of a device be computed with in their own dtypes, also in `torch.autocast`."""
    try:
        enabled = torch.is_autocast_enabled(device.type)
    except RuntimeError:
        enabled = False  # not every type of device has autocast
    return torch.autocast(device.type, enabled=False) if enabled else nullcontext()


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which statistics of a model in some dtype are kept: float32 or better."""
    return torch.promote_types(dtype, torch.float32)


def check_finite(total: Tensor, what: str) -> None:
    """Raise unless a sum is finite, which requires that every number in it is.

    Args:
        total: The sum, a scalar tensor.
        what: The numbers whose squares were summed, for the message.
    """
    if not bool(torch.isfinite(total)):
        raise NotFiniteError(
            f"the {what} are not finite (NaN, infinity, or overflow when squared in {total.dtype});"
            f" look for such values in the data and the parameters, or has training diverged? "
            f"Finite values this large need a model in float64 (model.double())"
        )


def check_trace(trace: Tensor, label: str) -> None:
    """Raise unless the sum of a block's eigenvalues is finite, so that each of them is.

    Args:
        trace: The sum, a scalar tensor.
        label: What to call the block.
    """
    if not bool(torch.isfinite(trace)):
        raise NotFiniteError(
            f"the Fisher matrix of {label!r} is not finite: its eigenvalues, or their sum, are too "
            f"large for {trace.dtype}, or NaN; has training diverged? Finite values this large "
            f"need a model in float64 (model.double()), or smaller task weights"
        )


def underflowed(squares: Tensor) -> bool:
    """Whether all of some (sums of) squares are below the smallest normal number of their dtype."""
    if not squares.numel():
        return False
    return float(squares.max()) < torch.finfo(squares.dtype).tiny
