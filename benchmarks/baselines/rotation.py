"""Layers that are trained in rotated coordinates."""

from dataclasses import dataclass

import torch
from opt_einsum import contract
from torch import Tensor, nn
from torch.nn.utils import parametrize

from benchmarks.baselines.layers import Layer


@dataclass(frozen=True)
class Rotation:
    """Orthonormal bases of a layer's outputs and inputs.

    Attributes:
        outputs: ``U2``, ``[d_out, d_out]``, a basis vector in each column.
        inputs: ``U1``, ``[d_in, d_in]``; for a convolution ``d_in`` counts channels, not pixels.
    """

    outputs: Tensor
    inputs: Tensor

    def to_rotated(self, weight: Tensor) -> Tensor:
        """Return ``W' = U2ᵀ W U1``; convolutions are rotated pixel by pixel of the kernel."""
        rotated: Tensor = contract("op,oi...,ij->pj...", self.outputs, weight, self.inputs)
        return rotated

    def from_rotated(self, rotated: Tensor) -> Tensor:
        """Return ``W = U2 W' U1ᵀ``."""
        weight: Tensor = contract("po,oi...,ji->pj...", self.outputs, rotated, self.inputs)
        return weight

    def padded(self, weight: Tensor) -> "Rotation":
        """Return the rotation of a grown weight, which leaves the new inputs and outputs alone."""
        return Rotation(
            _with_identity(self.outputs, weight.shape[0]),
            _with_identity(self.inputs, weight.shape[1]),
        )


class RotatedWeight(nn.Module):
    """A parametrisation: what is trained is ``W'``, what the layer uses is ``W``."""

    outputs: Tensor
    inputs: Tensor

    def __init__(self, rotation: Rotation) -> None:
        """Keep the bases, as buffers."""
        super().__init__()
        self.register_buffer("outputs", rotation.outputs)
        self.register_buffer("inputs", rotation.inputs)

    def forward(self, rotated: Tensor) -> Tensor:
        """Return ``W``."""
        return Rotation(self.outputs, self.inputs).from_rotated(rotated)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return ``W'``."""
        return Rotation(self.outputs, self.inputs).to_rotated(weight)


def is_rotated(layer: nn.Module) -> bool:
    """Whether a layer's weight is trained in rotated coordinates."""
    if not parametrize.is_parametrized(layer, "weight"):
        return False
    steps: nn.Module = layer.parametrizations["weight"]  # type: ignore[index, assignment]
    return isinstance(steps[0], RotatedWeight)  # type: ignore[index]


def trained_weight(layer: Layer) -> Tensor:
    """Return the parameter behind a layer's weight: ``W'`` if that is rotated, else ``W``."""
    if not is_rotated(layer):
        return layer.weight
    steps: nn.Module = layer.parametrizations["weight"]  # type: ignore[index, assignment]
    original: Tensor = steps.original  # type: ignore[assignment]
    return original


def rotate(layer: Layer, rotation: Rotation) -> None:
    """Train a layer's weight in rotated coordinates; its parameter remains the same object."""
    parametrize.register_parametrization(layer, "weight", RotatedWeight(rotation))
    layer.parametrizations.train(layer.training)  # type: ignore[union-attr]


def rotate_back(layer: Layer) -> None:
    """Train a layer's weight as it is; its parameter remains the same object."""
    if is_rotated(layer):
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)


def _with_identity(basis: Tensor, size: int) -> Tensor:
    """Add unit vectors to a basis."""
    padded = torch.eye(size, dtype=basis.dtype, device=basis.device)
    padded[: len(basis), : len(basis)] = basis
    return padded
