"""The inputs and output gradients of layers, taken from forward and backward passes.

For one example the gradient of a layer's weight, as a matrix ``[d_out, d_in]``, is ``Σ_s g_s a_sᵀ``
over the positions ``s`` at which the weight is used: one for a linear layer on vectors, the pixels
of the output for a convolution.
"""

from contextlib import ExitStack
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
    """A layer's part in the gradients of ``n`` examples: ``Σ_s g_s a_sᵀ`` for each.

    Attributes:
        inputs: ``a``, ``[n, S, d_in]``; for a convolution the patches, ``d_in`` being (channel,
            row, column).
        gradients: ``g``, ``[n, S, d_out]``.
        pixels: The layer's inputs pixel by pixel, ``[n, P, channels]``; ``a`` for linear layers.
    """

    inputs: Tensor
    gradients: Tensor
    pixels: Tensor


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


class Capture:
    """Watches layers for the duration of a ``with`` block, in which each is called at most once."""

    def __init__(self, layers: dict[str, Layer]) -> None:
        """Watch nothing yet."""
        self._layers = layers
        # Edges in the graph remain right if an output is changed in place.
        self._calls: dict[str, tuple[Tensor, GradientEdge]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> "Capture":
        """Start watching."""
        for name, layer in self._layers.items():
            self._stack.callback(layer.register_forward_hook(partial(self._note, name)).remove)
        return self

    def __exit__(self, *error: object) -> None:
        """Stop watching."""
        self._stack.close()

    def backward(self, outputs: Tensor, vectors: Tensor) -> dict[str, Outer]:
        """Pull ``[N, C]`` back from outputs to layers, by name; the graph is kept."""
        edges = [edge for _, edge in self._calls.values()]
        pulled = torch.autograd.grad(
            outputs, edges, grad_outputs=vectors, retain_graph=True, allow_unused=True
        )
        return {
            name: _outer(self._layers[name], inputs, gradient)
            for (name, (inputs, _)), gradient in zip(self._calls.items(), pulled, strict=True)
            if gradient is not None
        }

    def _note(self, name: str, layer: nn.Module, args: Any, output: Tensor) -> None:
        """Note a call of a layer."""
        if name in self._calls:
            raise ValueError(f"cannot protect {name!r}: it is called more than once")
        self._calls[name] = args[0].detach(), get_gradient_edge(output)


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
