"""The inputs and output gradients of layers, taken from forward and backward passes.

For one example the gradient of a layer's weight, as a matrix ``[d_out, d_in]``, is ``Σ_s g_s a_sᵀ``
over the positions ``s`` at which the weight is used: one for a linear layer on vectors, the pixels
of the output for a convolution.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

Layer = nn.Linear | nn.Conv2d


@dataclass(frozen=True)
class Outer:
    """A layer's part in the gradients of ``n`` examples: ``Σ_s g_s a_sᵀ`` for each."""

    inputs: Tensor  # ``a``, ``[n, S, d_in]``; of a convolution patches (channel, row, column)
    gradients: Tensor  # ``g``, ``[n, S, d_out]``
    pixels: Tensor  # inputs by pixel, ``[n, P, channels]``; ``a`` for linear layers


def trained_layers(model: nn.Module) -> dict[str, Layer]:
    """The layers of a model by name; ``ValueError`` if others are trained, or one is frozen."""
    layers = {name: module for name, module in model.named_modules() if _is_layer(module)}
    known = {id(p) for layer in layers.values() for p in layer.parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) not in known or not parameter.requires_grad:
            raise ValueError(
                f"cannot protect {name!r}: expected a trained weight or bias of an nn.Linear, or "
                "of an nn.Conv2d without groups"
            )
    return layers


def _is_layer(module: nn.Module) -> TypeGuard[Layer]:
    plain = isinstance(module, nn.Conv2d) and module.groups == 1 and module.padding_mode == "zeros"
    return plain or isinstance(module, nn.Linear)


Calls = dict[str, tuple[Tensor, GradientEdge]]


@contextmanager
def watched(layers: dict[str, Layer]) -> Iterator[Calls]:
    """Note inputs and outputs of layers, each of which is called at most once."""
    calls: Calls = {}

    def note(name: str, layer: nn.Module, args: Any, output: Tensor) -> None:
        if name in calls:
            raise ValueError(f"cannot protect {name!r}: it is called more than once")
        # Edges in the graph remain right if an output is changed in place.
        calls[name] = args[0].detach(), get_gradient_edge(output)

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_hook(partial(note, name)).remove)
        yield calls


def pull_back(
    layers: dict[str, Layer], calls: Calls, outputs: Tensor, vectors: Tensor
) -> dict[str, Outer]:
    """Pull ``[N, C]`` back from the outputs to the layers they depend on; the graph is kept."""
    edges = [edge for _, edge in calls.values()]
    pulled = torch.autograd.grad(outputs, edges, vectors, retain_graph=True, allow_unused=True)
    return {
        name: _outer(layers[name], inputs, gradient)
        for (name, (inputs, _)), gradient in zip(calls.items(), pulled, strict=True)
        if gradient is not None
    }


def _outer(layer: Layer, inputs: Tensor, gradient: Tensor) -> Outer:
    """Bring one call of a layer into the common layout."""
    if isinstance(layer, nn.Linear):
        vectors = inputs.unsqueeze(1)
        return Outer(vectors, gradient.unsqueeze(1), vectors)
    patches = F.unfold(inputs, layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # type: ignore[arg-type]
    return Outer(
        rearrange(patches, "n d s -> n s d"),
        rearrange(gradient, "n d h w -> n (h w) d"),
        rearrange(inputs, "n d h w -> n (h w) d"),
    )
