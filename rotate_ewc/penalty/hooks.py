"""What an attached penalty needs besides PyTorch's hooks around the steps of optimizers."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from types import MethodType
from typing import Any

import torch
from torch.optim import Optimizer


def evaluated(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Evaluate the closure of a step now, and return arguments with its result; None without one.

    The gradients that it computes are those that are changed.
    """
    closure: Callable[[], Any] | None = args[1] if len(args) > 1 else kwargs.get("closure")
    if closure is None:
        return None
    with torch.enable_grad():
        loss = closure()
    if len(args) > 1:
        return (args[0], lambda: loss, *args[2:]), kwargs
    return args, {**kwargs, "closure": lambda: loss}


def guarded(optimizer: Optimizer, undo: Callable[[], None]) -> Callable[..., Any]:
    """Return an optimizer's `step` that undoes what hooks have begun if it raises.

    Hooks after a step do not run if it fails. A bound method, as schedulers expect that wrap it.
    """
    inner = optimizer.step

    @wraps(getattr(inner, "__func__", inner))
    def step(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        try:
            return inner(*args, **kwargs)
        except BaseException:
            undo()
            raise

    return MethodType(step, optimizer)
