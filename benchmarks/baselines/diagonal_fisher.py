"""Elastic weight consolidation with the exact diagonal of the Fisher matrix.

Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", PNAS 2017.
"""

from typing import Any

import torch
from opt_einsum import contract
from torch import Tensor, nn

from benchmarks.baselines.capture import Outer, pull_back, trained_layers, watched
from benchmarks.baselines.plugin import Examples, QuadraticPlugin, evaluating, forward

CHUNK = 32  # examples whose gradients are in memory at a time


class DiagonalFisherEWC(QuadraticPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Penalises ``½ λ Σ_t Σ_i F_ti (θ_i - θ*_ti)²``.

    ``F_ti`` is the mean over the examples of task ``t`` of ``Σ_y p(y|x) (∂ log p(y|x) / ∂θ_i)²``,
    over all classes ``y`` and with the model's own predictions after that task: neither the given
    labels nor squares of gradients of whole batches.

    The sum over tasks is kept as one quadratic, ``½ λ Σ_i P_i (θ_i - m_i)²`` with ``P = Σ_t F_t``
    and ``m = Σ_t F_t θ*_t / P``. It has the same gradient; its value is less by a constant, the
    spread of the anchors of the tasks. Where ``P_i`` is zero nothing is anchored.

    Attributes:
        precision: ``P`` by name of parameter, in its shape.
        anchor: ``m`` likewise.
    """

    def __init__(self, strength: float, *, samples: int | None, seed: int) -> None:
        """Protect nothing yet; for the arguments see :class:`QuadraticPlugin`."""
        super().__init__(strength, samples=samples, seed=seed)
        self.precision: dict[str, Tensor] = {}
        self.anchor: dict[str, Tensor] = {}

    def penalty(self, model: nn.Module) -> Tensor:
        """Return the penalty, a scalar with a gradient."""
        parameters = dict(model.named_parameters())
        terms = [
            (precision * (parameters[name] - self.anchor[name]).square()).sum()
            for name, precision in self.precision.items()
        ]
        return 0.5 * self.strength * torch.stack(terms).sum()

    def consolidate(self, strategy: Any, examples: Examples) -> None:
        """Add the Fisher matrix of a task, and move the anchors."""
        parameters = dict(strategy.model.named_parameters())
        for name, fisher in exact_diagonal(strategy.model, examples).items():
            now = parameters[name].detach()
            precision = self.precision.get(name, torch.zeros_like(fisher)) + fisher
            share = torch.where(precision > 0, fisher / precision, torch.ones_like(fisher))
            self.precision[name] = precision
            self.anchor[name] = torch.lerp(self.anchor.get(name, now), now, share)


def exact_diagonal(model: nn.Module, examples: Examples) -> dict[str, Tensor]:
    """Mean over examples, by name of parameter; zeros for parameters that were not used."""
    layers = trained_layers(model)
    sums = {name: torch.zeros_like(p, requires_grad=False) for name, p in model.named_parameters()}
    with evaluating(model):
        for batch in examples:
            with watched(layers) as calls:
                logits = forward(model, batch)
            squares: dict[str, tuple[Outer, Tensor]] = {}
            for vectors in _vectors(logits).unbind(1):
                for name, outer in pull_back(layers, calls, logits, vectors).items():
                    if isinstance(layers[name], nn.Conv2d):
                        _add_positions(name, outer, sums)
                        continue
                    # The inputs are the same for all classes, so their squares wait for the sum.
                    square = outer.gradients.squeeze(1).square()
                    _, before = squares.get(name, (outer, torch.zeros_like(square)))
                    squares[name] = (outer, before + square)
            for name, (outer, square) in squares.items():
                _add(sums, name, square.T @ outer.inputs.squeeze(1).square(), square.sum(0))
    return {name: total / len(examples) for name, total in sums.items()}


def _vectors(logits: Tensor) -> Tensor:
    """Return the gradients of cross-entropy for every class, times √p: ``[n, y, C]``."""
    probabilities = logits.detach().softmax(1)
    identity = torch.eye(logits.shape[1], dtype=logits.dtype, device=logits.device)
    return probabilities.sqrt().unsqueeze(2) * (probabilities.unsqueeze(1) - identity)


def _add_positions(name: str, outer: Outer, sums: dict[str, Tensor]) -> None:
    """Add the squared gradients of a layer that is used at several positions of an example."""
    for start in range(0, len(outer.inputs), CHUNK):
        part = slice(start, start + CHUNK)
        a, g = outer.inputs[part], outer.gradients[part]
        gradients = contract("nso,nsi->noi", g, a)
        _add(sums, name, gradients.square().sum(0), g.sum(1).square().sum(0))


def _add(sums: dict[str, Tensor], layer: str, weight: Tensor, bias: Tensor) -> None:
    """Add to the sums of a layer's weight and, if it has one, bias."""
    for kind, squares in (("weight", weight), ("bias", bias)):
        if (total := sums.get(f"{layer}.{kind}")) is not None:
            total += squares.reshape(total.shape)
