"""All the functions by which torch calls one operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

_OWNERS: Final = (torch, Tensor, F, torch.linalg, torch.special)


def spellings(*names: str) -> tuple[Callable[..., Any], ...]:
    """Return the functions of torch, and the methods of its tensors, that have one of the names."""
    found = (getattr(owner, name, None) for name in names for owner in _OWNERS)
    return tuple(dict.fromkeys(function for function in found if function is not None))


def named(rule: Any, *names: str) -> dict[Callable[..., Any], Any]:
    """Return the same rule for all spellings."""
    return dict.fromkeys(spellings(*names), rule)
