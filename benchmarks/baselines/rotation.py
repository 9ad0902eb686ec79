"""Layers that are trained in rotated coordinates."""

from dataclasses import dataclass

from opt_einsum import contract
from torch import Tensor, nn
from torch.nn.utils import parametrize

from benchmarks.baselines.capture import Layer


@dataclass(frozen=True)
class Rotation:
    """Orthonormal bases of a layer's outputs and inputs.

    Attributes:
        outputs: ``U2``, ``[d_out, d_out]``, a basis vector in each column.
        inputs: ``U1``, ``[d_in, d_in]``; for a convolution ``d_in`` counts channels, not pixels.
    """

    outputs: Tensor
    inputs: Tensor


class RotatedWeight(nn.Module):
    """A parametrisation: what is trained is ``W' = U2ᵀ W U1``, what the layer uses is ``W``.

    Convolutions are rotated pixel by pixel of the kernel.
    """

    outputs: Tensor
    inputs: Tensor

    def __init__(self, rotation: Rotation) -> None:
        """Keep the bases, as buffers."""
        super().__init__()
        self.register_buffer("outputs", rotation.outputs)
        self.register_buffer("inputs", rotation.inputs)

    def forward(self, rotated: Tensor) -> Tensor:
        """Return ``W = U2 W' U1ᵀ``."""
        weight: Tensor = contract("po,oi...,ji->pj...", self.outputs, rotated, self.inputs)
        return weight

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return ``W'``."""
        rotated: Tensor = contract("op,oi...,ij->pj...", self.outputs, weight, self.inputs)
        return rotated


def is_rotated(layer: nn.Module) -> bool:
    """Whether a layer's weight is trained in rotated coordinates."""
    return parametrize.is_parametrized(layer, "weight")


def trained_weight(layer: Layer) -> Tensor:
    """Return the parameter behind a layer's weight: ``W'`` if that is rotated, else ``W``."""
    if not is_rotated(layer):
        return layer.weight
    original: Tensor = layer.parametrizations["weight"].original  # type: ignore[index, union-attr]
    return original


def rotate(layer: Layer, rotation: Rotation) -> None:
    """Train a layer's weight in rotated coordinates; its parameter remains the same object."""
    parametrize.register_parametrization(layer, "weight", RotatedWeight(rotation))
    layer.parametrizations.train(layer.training)  # type: ignore[union-attr]


def rotate_back(layer: Layer) -> None:
    """Train a layer's weight as it is; its parameter remains the same object."""
    if is_rotated(layer):
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
