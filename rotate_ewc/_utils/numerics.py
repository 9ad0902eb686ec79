"""Dtypes in which statistics are computed, and numbers that these cannot hold."""

from __future__ import annotations

from collections.abc import Callable
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
        if first is None or not _autocasts(first.device.type):
            return function(*args, **kwargs)
        with torch.autocast(first.device.type, enabled=False):
            return function(*args, **kwargs)

    return wrapped


def _autocasts(device_type: str) -> bool:
    """Return whether autocast is enabled for a type of device, which need not know of it."""
    try:
        return torch.is_autocast_enabled(device_type)
    except RuntimeError:
        return False  # as for the meta device


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which statistics of a model in some dtype are kept: float32 or better."""
    return torch.promote_types(dtype, torch.float32)


def check_finite(total: Tensor, what: str) -> None:
    """Raise unless a sum is finite, as it is only if every number in it is.

    Args:
        total: A scalar tensor.
        what: Squares of what it is the sum of.
    """
    if not bool(torch.isfinite(total)):
        raise NotFiniteError(
            f"the {what} are not finite (NaN, infinity, or overflow when squared in {total.dtype});"
            f" look for such values in the data and the parameters, or has training diverged? "
            f"Finite values that are so large need a model in float64 (model.double())"
        )


def check_trace(trace: Tensor, label: str) -> None:
    """Raise unless the sum of a block's eigenvalues is finite, as it is only if all of them are.

    Args:
        trace: The sum, a scalar tensor.
        label: What to call the block.
    """
    if not bool(torch.isfinite(trace)):
        raise NotFiniteError(
            f"the Fisher matrix of {label!r} is not finite: its eigenvalues, or their sum, are too "
            f"large for {trace.dtype}, or no numbers; has training diverged? Finite values that "
            f"are so large need a model in float64 (model.double()), or smaller weights of the "
            f"tasks"
        )


def is_faint(squares: Tensor | None) -> bool:
    """Whether all of some squares, or sums of them, are below what their dtype holds precisely."""
    if squares is None or not squares.numel():
        return False
    return float(squares.max()) < torch.finfo(squares.dtype).tiny
