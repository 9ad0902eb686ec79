"""R-EWC: elastic weight consolidation after rotating the layers by the last task's moments.

Liu, Masana, Herranz, Van de Weijer, López and Bagdanov, "Rotate your networks: better weight
consolidation and less catastrophic forgetting", ICPR 2018.
"""

from dataclasses import dataclass
from typing import Any

import torch
from opt_einsum import contract
from torch import Tensor, nn
from torch.nn.utils import parametrize

from benchmarks.baselines.capture import Layer, Outer, trained_layers
from benchmarks.baselines.diagonal_fisher import CHUNK
from benchmarks.baselines.plugin import (
    LABELLING,
    Examples,
    QuadraticPlugin,
    make_generator,
    sampled_passes,
)


@dataclass(frozen=True)
class Rotation:
    """Orthonormal bases of a layer's outputs and inputs."""

    outputs: Tensor  # ``U2``, ``[d_out, d_out]``, a basis vector in each column
    inputs: Tensor  # ``U1``, ``[d_in, d_in]``; of a convolution ``d_in`` counts channels


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


@dataclass(frozen=True)
class RotatedFisher:
    """The diagonal of a layer's Fisher matrix in rotated coordinates, and where it is anchored."""

    rotation: Rotation  # the coordinates
    weight: Tensor  # the diagonal for ``W'``, in the shape of the weight
    anchor: Tensor  # ``W'`` when the task ended
    bias: Tensor | None  # the diagonal for the bias; None without one
    bias_anchor: Tensor | None  # the bias when the task ended


class PublishedRotatedEWC(QuadraticPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Trains ``W' = U2ᵀ W U1`` in place of ``W``, under ``½ λ Σ_i F'_i (θ'_i - θ'*_i)²``.

    ``U1`` and ``U2`` are the eigenvectors of the uncentred second moments of the layer's inputs and
    of the gradients of its outputs, over the examples of the last task. For a convolution these
    are moments of channels, over all pixels, and only the channels are rotated, as by the 1×1
    convolutions of the paper. After the next task the rotation is taken back and that of the new
    task put in its place; the function of the network does not change in either step. Rotation,
    diagonal and anchor are those of the last task alone (for the head of another task, which the
    last one did not use: those of the last task that did). Biases are not rotated.

    The Fisher matrix is that of the model's own predictions: the gradients, for the moments and
    for the diagonal, are those of one label for each example, drawn from the predictions. So the
    paper defines it, and so its authors' program computes it. All layers are rotated here, the
    last included, which that program leaves as it is on MNIST.

    A parametrisation of ``torch.nn.utils.parametrize`` does the rotation, so that any optimizer
    works in rotated coordinates. The parameter remains the same object, under another name. What
    the optimizer knows of it (Adam's moments, momentum) belongs to the old coordinates and is
    dropped; what it knows of biases remains.

    Attributes:
        fisher: By name of layer; none for layers that no task has used.
    """

    def __init__(self, strength: float, *, samples: int | None, seed: int) -> None:
        """Protect nothing yet; for the arguments see :class:`QuadraticPlugin`."""
        super().__init__(strength, samples=samples, seed=seed)
        self.fisher: dict[str, RotatedFisher] = {}

    def penalty(self, model: nn.Module) -> Tensor:
        """Return the penalty, a scalar with a gradient."""
        layers: dict[str, Any] = dict(model.named_modules())
        terms = []
        for name, fisher in self.fisher.items():
            layer = layers[name]
            terms.append((fisher.weight * (trained_weight(layer) - fisher.anchor).square()).sum())
            if fisher.bias is not None and fisher.bias_anchor is not None:
                terms.append((fisher.bias * (layer.bias - fisher.bias_anchor).square()).sum())
        return 0.5 * self.strength * torch.stack(terms).sum()

    def consolidate(self, strategy: Any, examples: Examples) -> None:
        """Rotate the layers that the task used, and anchor their weights."""
        model = strategy.model
        layers = trained_layers(model)
        old = [name for name, layer in layers.items() if is_rotated(layer)]
        for name in old:
            rotate_back(layers[name])
        seed = (self._seed, self.tasks, LABELLING)
        rotations = moment_bases(model, layers, examples, make_generator(*seed))
        diagonals = rotated_diagonals(model, layers, rotations, examples, make_generator(*seed))
        for name, rotation in rotations.items():
            layer = layers[name]
            rotate(layer, rotation)
            # What the optimizer knows of the weight is of other coordinates.
            strategy.optimizer.state.pop(trained_weight(layer), None)
            weight, bias = diagonals[name]
            self.fisher[name] = RotatedFisher(
                rotation=rotation,
                weight=weight,
                anchor=trained_weight(layer).detach().clone(),
                bias=None if layer.bias is None else bias,
                bias_anchor=None if layer.bias is None else layer.bias.detach().clone(),
            )
        for name in old:
            if name not in rotations:
                rotate(layers[name], self.fisher[name].rotation)


def moment_bases(
    model: nn.Module, layers: dict[str, Layer], examples: Examples, generator: torch.Generator
) -> dict[str, Rotation]:
    """Find the eigenvectors of both moments of all layers that the examples use, by name."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    for outers in sampled_passes(model, layers, examples, generator):
        for name, outer in outers.items():
            a, g = outer.pixels, outer.gradients
            inputs[name] = inputs.get(name, 0) + contract("nsi,nsj->ij", a, a)
            outputs[name] = outputs.get(name, 0) + contract("nsi,nsj->ij", g, g)
    return {name: Rotation(_basis(outputs[name]), _basis(inputs[name])) for name in inputs}


def rotated_diagonals(
    model: nn.Module,
    layers: dict[str, Layer],
    rotations: dict[str, Rotation],
    examples: Examples,
    generator: torch.Generator,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean squares of the gradients of single examples, of ``W'`` and of the bias, by layer."""
    weights = {name: torch.zeros_like(layers[name].weight) for name in rotations}
    biases = {name: weights[name].new_zeros(len(weights[name])) for name in rotations}
    for outers in sampled_passes(model, layers, examples, generator):
        for name, outer in outers.items():
            weights[name] += _sum_of_squares(layers[name], rotations[name], outer)
            biases[name] += outer.gradients.sum(1).square().sum(0)
    count = len(examples)
    return {name: (weights[name] / count, biases[name] / count) for name in rotations}


def _sum_of_squares(layer: Layer, rotation: Rotation, outer: Outer) -> Tensor:
    """Sum the squares of the gradients of ``W'`` over the examples of a batch."""
    a, g = outer.inputs, outer.gradients @ rotation.outputs
    if isinstance(layer, nn.Linear):
        squares: Tensor = g.squeeze(1).square().T @ (a @ rotation.inputs).squeeze(1).square()
        return squares
    total: Tensor = torch.zeros_like(layer.weight, requires_grad=False)
    for start in range(0, len(a), CHUNK):
        part = slice(start, start + CHUNK)
        gradients = contract("nso,nsi->noi", g[part], a[part])
        # The input channels come first in d_in, before the pixels of a convolution's kernel.
        kernels = gradients.unflatten(2, (len(rotation.inputs), -1))
        rotated = contract("noik,ij->nojk", kernels, rotation.inputs)
        total += rotated.square().sum(0).reshape(total.shape)
    return total


def _basis(moment: Tensor) -> Tensor:
    """Return the eigenvectors of a symmetric matrix, in columns."""
    vectors: Tensor = torch.linalg.eigh(moment.double()).eigenvectors
    return vectors.to(moment.dtype)
