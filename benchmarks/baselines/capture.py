"""The inputs and output gradients of layers, taken from forward and backward passes."""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType
from typing import Any

import torch
from opt_einsum import contract
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from benchmarks.baselines.layers import Layer, channels, features, parameter_name

RELATIVE_TOLERANCE = 1e-2


@dataclass(frozen=True)
class Use:
    """One call of a layer.

    Attributes:
        layer: The layer.
        inputs: What it was given, without a graph.
        edge: Where its output is in the graph; still right if the output is changed in place.
    """

    layer: Layer
    inputs: Tensor
    edge: GradientEdge

    @cached_property
    def features(self) -> Tensor:
        """What the weight was multiplied with, ``[n, S, d_in]``."""
        return features(self.layer, self.inputs)

    @cached_property
    def pixels(self) -> Tensor:
        """What the layer was given, pixel by pixel, ``[n, P, channels]``."""
        return channels(self.layer, self.inputs)


@dataclass(frozen=True)
class Outer:
    """A layer's part in the gradients of ``n`` examples: ``Σ_s g_s a_sᵀ`` for each.

    Attributes:
        inputs: ``a``, ``[n, S, d_in]``.
        gradients: ``g``, ``[n, S, d_out]``.
        pixels: The layer's inputs pixel by pixel, ``[n, P, channels]``; ``a`` for linear layers.
    """

    inputs: Tensor
    gradients: Tensor
    pixels: Tensor


class Capture:
    """Watches layers for the duration of a ``with`` block.

    Attributes:
        uses: Every call of a layer, in order, by the layer's name.
    """

    def __init__(self, layers: Mapping[str, Layer]) -> None:
        """Watch nothing yet.

        Args:
            layers: The layers by name.
        """
        self.uses: dict[str, list[Use]] = {name: [] for name in layers}
        self._layers = layers
        self._stack = ExitStack()

    def __enter__(self) -> "Capture":
        """Start watching."""
        for name, layer in self._layers.items():
            handle = layer.register_forward_hook(self._hook(name, layer), with_kwargs=True)
            self._stack.callback(handle.remove)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop watching."""
        self._stack.close()

    def backward(self, outputs: Tensor, vectors: Tensor) -> dict[str, Outer]:
        """Pull vectors back from the model's outputs to those of the layers.

        Args:
            outputs: Of the forward pass that was watched, ``[N, C]``. The graph is kept.
            vectors: The gradient of something with respect to them, ``[N, C]``.

        Returns:
            By name, for every layer that the outputs depend on; the positions of several calls of
            one layer follow each other.
        """
        calls = [(name, use) for name, uses in self.uses.items() for use in uses]
        edges = [use.edge for _, use in calls]
        if not edges:
            return {}
        pulled = torch.autograd.grad(
            outputs, edges, grad_outputs=vectors, retain_graph=True, allow_unused=True
        )
        parts: dict[str, list[Outer]] = {}
        for (name, use), gradient in zip(calls, pulled, strict=True):
            if gradient is not None:
                parts.setdefault(name, []).append(_outer(use, gradient))
        return {name: _joined(several) for name, several in parts.items()}

    def check(self, outputs: Tensor, ignored: Iterable[Tensor] = ()) -> None:
        """Make sure that what was watched explains the gradients of the layers' parameters.

        Args:
            outputs: Of the forward pass that was watched, ``[N, C]``. The graph is kept.
            ignored: Parameters of the layers that need no explanation.

        Raises:
            ValueError: If a layer's parameter was also used in some other way, naming it.
        """
        ramp = torch.linspace(1, 2, outputs.shape[1], dtype=outputs.dtype, device=outputs.device)
        vectors = ramp.expand_as(outputs)
        outers = self.backward(outputs, vectors)
        ignored_ids = {id(parameter) for parameter in ignored}
        for name, layer in self._layers.items():
            outer = outers.get(name)
            for kind, parameter in layer.named_parameters(recurse=False):
                if parameter.requires_grad and id(parameter) not in ignored_ids:
                    expected = _gradient(outputs, parameter, vectors)
                    found = torch.zeros_like(expected) if outer is None else _sum(outer, expected)
                    error, size = (found - expected).abs().max(), expected.abs().max()
                    if error > RELATIVE_TOLERANCE * size + torch.finfo(size.dtype).tiny:
                        raise ValueError(
                            f"cannot protect {parameter_name(name, kind)!r}: it is used in other "
                            f"ways than by calling the layer"
                        )

    def _hook(self, name: str, layer: Layer) -> Any:
        """Make the hook that notes the calls of one layer."""

        def note(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            inputs: Tensor = args[0] if args else kwargs["input"]
            dimensions = 4 if isinstance(layer, nn.Conv2d) else 2
            if inputs.ndim < dimensions:
                raise ValueError(
                    f"{name!r} was given an input of shape {list(inputs.shape)}; expected at least "
                    f"{dimensions} axes, the first that of the examples"
                )
            self.uses[name].append(Use(layer, inputs.detach(), get_gradient_edge(output)))

        return note


def _outer(use: Use, gradient: Tensor) -> Outer:
    """Bring one call of a layer into the common layout."""
    return Outer(use.features, channels(use.layer, gradient), use.pixels)


def _joined(parts: list[Outer]) -> Outer:
    """Put several calls of one layer after each other along the axis of positions."""
    if len(parts) == 1:
        return parts[0]
    return Outer(
        torch.cat([part.inputs for part in parts], dim=1),
        torch.cat([part.gradients for part in parts], dim=1),
        torch.cat([part.pixels for part in parts], dim=1),
    )


def _gradient(outputs: Tensor, parameter: Tensor, vectors: Tensor) -> Tensor:
    """Return the gradient of a parameter, zero where it is not used."""
    (gradient,) = torch.autograd.grad(
        outputs, parameter, grad_outputs=vectors, retain_graph=True, allow_unused=True
    )
    return torch.zeros_like(parameter) if gradient is None else gradient


def _sum(outer: Outer, like: Tensor) -> Tensor:
    """Return the gradient of a weight or a bias, summed over examples, in that one's shape."""
    if like.ndim == 1:
        return outer.gradients.sum((0, 1))
    matrix: Tensor = contract("nso,nsi->oi", outer.gradients, outer.inputs)
    return matrix.reshape(like.shape)
