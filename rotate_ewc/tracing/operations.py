"""What functions of torch do with the tensors that they are given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, Final, TypeGuard

import torch
from torch import Tensor, nn

from rotate_ewc._utils.tree import tensors_in
from rotate_ewc.layers import spellings, stretched

# What these make depends on no data. But of the second kind may also be the first state of a
# recurrent layer, or examples that came as lists, and of the third the positions of every example's
# tokens: a layer's input.
CONSTANT: Final = frozenset({torch.arange, torch.eye, torch.linspace})
BLANK: Final = frozenset(
    spellings("zeros", "ones", "full", "new_zeros", "new_ones", "new_full")
    + spellings("tensor", "as_tensor", "from_numpy")
)
COPYING: Final = frozenset(
    spellings("expand", "expand_as", "broadcast_to", "repeat", "tile", "repeat_interleave")
)
JOINING: Final = frozenset(
    spellings("cat", "concat", "concatenate", "stack", "hstack", "vstack", "row_stack")
)
# These return the same numbers, and sometimes the same tensor.
SAME: Final = frozenset(spellings("clone", "contiguous"))
# What these make of a parameter has the shape or type of data, but does not depend on their values.
LIKE: Final = frozenset(
    spellings("expand", "expand_as", "broadcast_to", "view_as", "reshape_as", "type_as", "to")
)

# How functions of torch.nn.functional ask whether somebody wants to see them called.
_DISPATCH_CHECKS: Final = (
    "has_torch_function",
    "has_torch_function_unary",
    "has_torch_function_variadic",
)


def written(func: Callable[..., Any], args: Sequence[Any], result: Any) -> list[Tensor]:
    """Return the tensors that an operation has made, or written into."""
    return list(tensors_in(args[0] if func is Tensor.__setitem__ else result))


def is_in_place(func: Callable[..., Any]) -> bool:
    """Whether an operation writes into its first argument."""
    name = func.__name__
    own = name.endswith("_") and not name.endswith("__")
    return own or name == "__setitem__" or name.startswith("__i")


def can_broadcast(parameter: Tensor, shape: torch.Size, args: Sequence[Any]) -> bool:
    """Whether a parameter can be broadcast to a shape without changing what comes out."""
    try:
        stretched(parameter.detach(), shape)
    except RuntimeError:
        return False
    # A single number adapts to the dtype and the device of what it meets.
    return parameter.ndim > 0 or all(
        t.dtype == parameter.dtype and t.device == parameter.device
        for t in tensors_in(args)
        if t.is_floating_point()
    )


def is_checkpointed() -> bool:
    """Whether an operation will run again in the backward pass, and must save what it saves now."""
    hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return hooks is not None and hooks(False) is not None


def is_composite(func: Callable[..., Any]) -> TypeGuard[FunctionType]:
    """Whether a function is written in Python, of operations that can be seen themselves."""
    return isinstance(func, FunctionType) and func.__module__ == nn.functional.__name__


def opened(func: FunctionType) -> Callable[..., Any]:
    """Return a copy of a torch function that shows its inner calls instead of itself."""
    unseen = dict.fromkeys(_DISPATCH_CHECKS, lambda *_: False)
    copy = FunctionType(
        func.__code__,
        {**func.__globals__, **unseen},
        func.__name__,
        func.__defaults__,
        func.__closure__,
    )
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy
