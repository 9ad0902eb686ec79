"""Online structured Laplace: a Kronecker product for each layer, its factors summed over tasks.

Ritter, Botev and Barber, "Online structured Laplace approximations for overcoming catastrophic
forgetting", NeurIPS 2018.
"""

from dataclasses import dataclass
from typing import Any

import torch
from opt_einsum import contract
from torch import Tensor, nn

from benchmarks.baselines.capture import Layer, Outer, trained_layers
from benchmarks.baselines.plugin import (
    LABELLING,
    Examples,
    QuadraticPlugin,
    make_generator,
    sampled_passes,
)


@dataclass(frozen=True)
class Factors:
    """A layer's part of the curvature, ``G ⊗ A``."""

    inputs: Tensor  # ``A``, ``[d_in, d_in]``, with the bias, if there is one, as coordinate 0
    gradients: Tensor  # ``G``, ``[d_out, d_out]``

    def __add__(self, other: "Factors") -> "Factors":
        """Add both factors, each by itself."""
        return Factors(self.inputs + other.inputs, self.gradients + other.gradients)


class KroneckerLaplace(QuadraticPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Penalises ``½ λ Σ_layers Δ : (G Δ A)``, with ``Δ`` the changes since the last task.

    ``Δ`` holds a layer's bias and weight as one matrix ``[d_out, 1 + d_in]``. For each task
    ``A_t = E[ã ãᵀ]``, of the inputs with a one in front, and ``G_t = E[g gᵀ]``, of the gradients of
    cross-entropy with labels drawn from the model, one for each example. Convolutions are treated
    as Grosse and Martens ("A Kronecker-factored approximate Fisher matrix for convolution layers",
    ICML 2016) do: ``A_t`` is summed over positions and averaged over examples, ``G_t`` averaged
    over both, so that the product has the scale of the Fisher matrix of one example.

    As in the paper, ``A = Σ_t A_t`` and ``G = Σ_t G_t`` are summed by themselves. Their product
    has the terms ``G_s ⊗ A_t`` of different tasks besides those of each: the penalty of ``T`` tasks
    that are alike is ``T²`` times that of one, not ``T`` times. The anchor is the latest mode
    alone, of all layers, also of those that the latest task did not use; such layers keep their
    factors. There is no prior.

    Attributes:
        factors: The sums by name of layer; none for layers that no task has used.
        anchor: By name, weight and bias as one matrix.
    """

    def __init__(self, strength: float, *, samples: int | None, seed: int) -> None:
        """Protect nothing yet; for the arguments see :class:`QuadraticPlugin`."""
        super().__init__(strength, samples=samples, seed=seed)
        self.factors: dict[str, Factors] = {}
        self.anchor: dict[str, Tensor] = {}

    def penalty(self, model: nn.Module) -> Tensor:
        """Return the penalty, a scalar with a gradient (but no second derivatives)."""
        layers: dict[str, Any] = dict(model.named_modules())
        terms = []
        for name, factors in self.factors.items():
            change = joint_matrix(layers[name]) - self.anchor[name]
            with torch.no_grad():
                # The gradient of the quadratic form. Given to the graph as a constant, it costs
                # two products of matrices in place of the six of a backward pass.
                pull = factors.gradients @ change @ factors.inputs
                value = 0.5 * (change * pull).sum()
            terms.append((change * pull).sum() - value)
        return self.strength * torch.stack(terms).sum()

    def consolidate(self, strategy: Any, examples: Examples) -> None:
        """Add the factors of a task, and anchor all layers where they are."""
        generator = make_generator(self._seed, self.tasks, LABELLING)
        for name, new in kronecker_factors(strategy.model, examples, generator).items():
            before = self.factors.get(name)
            self.factors[name] = new if before is None else before + new
        layers = trained_layers(strategy.model)
        self.anchor = {name: joint_matrix(layers[name]).detach().clone() for name in self.factors}


def kronecker_factors(
    model: nn.Module, examples: Examples, generator: torch.Generator
) -> dict[str, Factors]:
    """Estimate the factors of all layers that the examples use, by name of layer."""
    layers = trained_layers(model)
    sums: dict[str, Factors] = {}
    uses = dict.fromkeys(layers, 0)
    for outers in sampled_passes(model, layers, examples, generator):
        for name, outer in outers.items():
            new = _sums(layers[name], outer)
            sums[name] = sums[name] + new if name in sums else new
            uses[name] += outer.gradients.shape[0] * outer.gradients.shape[1]
    return {
        name: Factors(total.inputs / len(examples), total.gradients / uses[name])
        for name, total in sums.items()
    }


def joint_matrix(layer: Layer) -> Tensor:
    """Return a layer's bias, if it has one, and weight as one matrix ``[d_out, 1 + d_in]``."""
    weight = layer.weight.flatten(1)
    return weight if layer.bias is None else torch.cat([layer.bias.unsqueeze(1), weight], 1)


def _sums(layer: Layer, outer: Outer) -> Factors:
    """Sum both second moments over the examples of a batch and their positions."""
    a = outer.inputs
    if layer.bias is not None:
        a = torch.cat([torch.ones_like(a[..., :1]), a], -1)
    return Factors(
        contract("nsi,nsj->ij", a, a), contract("nsi,nsj->ij", outer.gradients, outer.gradients)
    )
