"""Layer families: one small file each, and the table that finds them.

A rule reads the arguments of a torch function that uses parameters and returns a `LayerCall`. To
teach the package a new layer, write its rule and add it to `RULES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
import torch.nn.functional as F

from rotate_ewc.layers.base import LayerCall
from rotate_ewc.layers.convolution import convolution
from rotate_ewc.layers.linear import linear

Rule = Callable[..., LayerCall]

RULES: Final[Mapping[Callable[..., Any], Rule]] = {
    F.linear: linear,
    torch.conv1d: convolution(1),
    torch.conv2d: convolution(2),
    torch.conv3d: convolution(3),
}

SUPPORTED: Final = "Linear, Conv1d, Conv2d and Conv3d"

__all__ = ["RULES", "SUPPORTED", "LayerCall", "Rule"]
