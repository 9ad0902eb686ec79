"""The layers whose gradients are outer products, and their inputs and gradients in one layout.

For one example the gradient of a layer's weight, as a matrix ``[d_out, d_in]``, is ``Σ_s g_s a_sᵀ``
over the positions ``s`` at which the weight is used: one for a linear layer on vectors, the pixels
of the output for a convolution. Inputs ``a`` are ``[n, S, d_in]``, gradients ``g`` of the outputs
``[n, S, d_out]``. The first axis of what a layer is given must be that of the examples.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeGuard

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

Layer = nn.Linear | nn.Conv2d


@dataclass(frozen=True)
class Trained:
    """What is trained in a model.

    Attributes:
        layers: By name, the layers with a trained weight or bias of their own.
        others: By name, the trained parameters of everything else, and those that are shared.
    """

    layers: dict[str, Layer] = field(default_factory=dict)
    others: dict[str, nn.Parameter] = field(default_factory=dict)


def trained(model: nn.Module) -> Trained:
    """Sort the trained parameters of a model by whether a layer has them to itself."""
    owners = Counter(id(parameter) for _, _, parameter in _trained_parameters(model))
    found = Trained()
    for name, module, parameter in _trained_parameters(model):
        if is_layer(module) and owners[id(parameter)] == 1:
            found.layers[name.rpartition(".")[0]] = module
        elif not any(parameter is other for other in found.others.values()):
            found.others[name] = parameter
    return found


def trained_layers(model: nn.Module) -> dict[str, Layer]:
    """List the trained layers of a model of which nothing else is trained.

    Args:
        model: The network.

    Returns:
        The layers by name.

    Raises:
        ValueError: If nothing is trained, or something that is neither a linear layer nor a
            convolution or that several modules share, or only one of a layer's weight and bias.
    """
    found = trained(model)
    for name in found.others:
        raise ValueError(
            f"cannot protect {name!r}: expected a weight or bias of one nn.Linear, or of one "
            f"nn.Conv2d without groups"
        )
    for name, layer in found.layers.items():
        if layer.bias is not None and layer.bias.requires_grad != layer.weight.requires_grad:
            raise ValueError(f"cannot protect {name!r}: train its weight and bias, or neither")
    if not found.layers:
        raise ValueError("the model has no trained layer to protect")
    return found.layers


def is_layer(module: nn.Module) -> TypeGuard[Layer]:
    """Whether a module is a linear layer or a convolution without groups."""
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)


def parameter_name(layer: str, kind: str) -> str:
    """Return the name of a layer's weight or bias; the model itself, if a layer, has no name."""
    return f"{layer}.{kind}" if layer else kind


def features(layer: Layer, inputs: Tensor) -> Tensor:
    """Return what a layer's weight matrix is multiplied with.

    Args:
        layer: The layer.
        inputs: Its inputs, ``[n, ..., d_in]`` or, for a convolution, ``[n, channels, H, W]``.

    Returns:
        ``[n, S, d_in]``; for a convolution the patches, ``d_in`` being (channel, row, column).
    """
    if isinstance(layer, nn.Linear):
        return rearrange(inputs, "n ... d -> n (...) d")
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(inputs, layer._reversed_padding_repeated_twice, mode=mode)
    patches = F.unfold(padded, layer.kernel_size, layer.dilation, padding=0, stride=layer.stride)
    return rearrange(patches, "n d s -> n s d")


def channels(layer: Layer, values: Tensor) -> Tensor:
    """Return a layer's inputs, outputs or gradients of outputs, pixel by pixel.

    Args:
        layer: The layer.
        values: ``[n, ..., d]`` or, for a convolution, ``[n, d, H, W]``.

    Returns:
        ``[n, S, d]``.
    """
    if isinstance(layer, nn.Linear):
        return rearrange(values, "n ... d -> n (...) d")
    return rearrange(values, "n d h w -> n (h w) d")


def _trained_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    """Yield the full name, the owner and the trained parameter, shared ones for every owner."""
    for prefix, module in model.named_modules(remove_duplicate=True):
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                yield parameter_name(prefix, name), module, parameter
