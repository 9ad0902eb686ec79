"""How one use of a layer's parameters makes per-example gradients: a file for each family.

In come the arguments of a torch function that uses parameters; out goes a `LayerCall`, which turns
inputs and output gradients into the factors of per-example gradients, or into these themselves. To
teach the package a layer, write a rule in the file of its family, and add it to `LAYERS`. Nothing
here may know of models, losses or data, or import from `tracing` or `estimation`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from rotate_ewc.layers.base import FactoredCall, Factors, Form, LayerCall, Rule, form_within_reach
from rotate_ewc.layers.broadcasting import broadcast_shape
from rotate_ewc.layers.compositions import COMPOSITIONS
from rotate_ewc.layers.contraction import einsum, inner, matmul, tensordot
from rotate_ewc.layers.convolution import convolution
from rotate_ewc.layers.copies import (
    broadcast,
    getitem,
    index_select,
    picking,
    stretched,
    token,
)
from rotate_ewc.layers.elementwise import scale, shift
from rotate_ewc.layers.embedding import embedding
from rotate_ewc.layers.linear import LinearCall, addmm, linear
from rotate_ewc.layers.normalization import (
    batch_norm,
    group_norm,
    instance_norm,
    layer_norm,
    rms_norm,
)
from rotate_ewc.layers.spellings import named, spellings
from rotate_ewc.layers.transposed_convolution import transposed_convolution

_PRODUCTS: Final[Mapping[Callable[..., Any], Rule]] = named(matmul, "matmul", "mm", "bmm", "mv")
_ELEMENTWISE: Final[Mapping[Callable[..., Any], Rule]] = {
    **named(scale, "mul", "multiply"),
    **named(shift(1), "add", "add_"),
    **named(shift(-1), "sub", "sub_", "subtract", "subtract_"),
}
_PICKING: Final[Mapping[Callable[..., Any], Rule]] = {
    Tensor.__getitem__: getitem,
    **named(index_select, "index_select"),
    **named(picking(torch.gather), "gather"),
    **named(picking(torch.take), "take"),
    **named(picking(torch.take_along_dim), "take_along_dim"),
    **named(picking(torch.repeat_interleave), "repeat_interleave"),
}

LAYERS: Final[Mapping[Callable[..., Any], Rule]] = {
    F.linear: linear,
    **_PRODUCTS,
    **named(addmm, "addmm"),
    **named(inner, "inner"),
    **named(tensordot, "tensordot"),
    **named(einsum, "einsum"),
    torch.sparse.mm: matmul,
    **named(convolution(1), "conv1d"),
    **named(convolution(2), "conv2d"),
    **named(convolution(3), "conv3d"),
    **named(transposed_convolution(1), "conv_transpose1d"),
    **named(transposed_convolution(2), "conv_transpose2d"),
    **named(transposed_convolution(3), "conv_transpose3d"),
    F.embedding: embedding,
    **named(layer_norm, "layer_norm"),
    **named(rms_norm, "rms_norm"),
    **named(group_norm, "group_norm"),
    F.batch_norm: batch_norm,
    F.instance_norm: instance_norm,
}
"""Functions that take data as their input, and parameters."""

RULES: Final[Mapping[Callable[..., Any], Rule]] = {**LAYERS, **_ELEMENTWISE, **_PICKING}
"""All functions for which there is a rule."""

BROADCASTING: Final[Mapping[Callable[..., Any], int]] = {
    **dict.fromkeys(_ELEMENTWISE, 0),
    **dict.fromkeys(_PRODUCTS, 2),
}
"""Functions that give the same result for a parameter and for that parameter expanded, except in so
many of its last axes."""

SUPPORTED: Final = (
    "linear and (transposed) convolution layers, products and einsums with one parameter, "
    "embeddings, attention, normalization layers, and parameters that are looked up, expanded over "
    "the examples, or combined with data element by element"
)

__all__ = [
    "BROADCASTING",
    "COMPOSITIONS",
    "LAYERS",
    "RULES",
    "SUPPORTED",
    "FactoredCall",
    "Factors",
    "Form",
    "LayerCall",
    "LinearCall",
    "Rule",
    "broadcast",
    "broadcast_shape",
    "form_within_reach",
    "spellings",
    "stretched",
    "token",
]
