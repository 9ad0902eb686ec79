"""Layer families, a file each: how one use of a layer's parameters makes per-example gradients.

In come the arguments of a torch function that uses parameters; out goes a `LayerCall`, which turns
inputs and output gradients into the factors of per-example gradients, or into these themselves. To
teach the package a layer, write a rule in the file of its family, and add it to `RULES`. Nothing
here may know of models, losses or data, or import from `tracing` or `estimation`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from rotate_ewc.layers.base import FactoredCall, Factors, Form, LayerCall, Rule
from rotate_ewc.layers.convolution import convolution
from rotate_ewc.layers.elementwise import scale, shift
from rotate_ewc.layers.embedding import embedding
from rotate_ewc.layers.linear import addmm, linear, matmul
from rotate_ewc.layers.normalization import (
    batch_norm,
    group_norm,
    instance_norm,
    layer_norm,
    rms_norm,
)
from rotate_ewc.layers.transposed_convolution import transposed_convolution

RULES: Final[Mapping[Callable[..., Any], Rule]] = {
    F.linear: linear,
    torch.matmul: matmul,
    Tensor.matmul: matmul,
    torch.mm: matmul,
    Tensor.mm: matmul,
    torch.sparse.mm: matmul,
    torch.addmm: addmm,
    torch.conv1d: convolution(1),
    torch.conv2d: convolution(2),
    torch.conv3d: convolution(3),
    torch.conv_transpose1d: transposed_convolution(1),
    torch.conv_transpose2d: transposed_convolution(2),
    torch.conv_transpose3d: transposed_convolution(3),
    F.embedding: embedding,
    F.layer_norm: layer_norm,
    F.rms_norm: rms_norm,
    F.group_norm: group_norm,
    F.batch_norm: batch_norm,
    F.instance_norm: instance_norm,
    torch.mul: scale,
    Tensor.mul: scale,
    torch.add: shift(1),
    Tensor.add: shift(1),
    Tensor.add_: shift(1),
    torch.sub: shift(-1),
    Tensor.sub: shift(-1),
    Tensor.sub_: shift(-1),
}

BROADCASTING: Final = frozenset(
    {torch.mul, Tensor.mul, torch.add, Tensor.add, Tensor.add_, torch.sub, Tensor.sub, Tensor.sub_}
)
"""Functions to which a parameter and the same parameter expanded are the same."""

SUPPORTED: Final = (
    "linear and (transposed) convolution layers, embeddings, attention, normalization layers, and "
    "parameters that scale or shift data"
)

__all__ = [
    "BROADCASTING",
    "RULES",
    "SUPPORTED",
    "FactoredCall",
    "Factors",
    "Form",
    "LayerCall",
    "Rule",
]
