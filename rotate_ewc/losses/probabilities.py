"""Binary cross-entropy of outputs that are probabilities already."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Generator, Tensor, nn

from rotate_ewc.losses.base import non_negative
from rotate_ewc.losses.draws import uniform
from rotate_ewc.losses.elementwise import Elementwise, check_fits, check_fractions

# What PyTorch takes for p (1 - p) where that is smaller.
_SMALLEST_VARIANCE: Final = 1e-12


@dataclass(frozen=True, eq=False)
class Probabilities(Elementwise):
    """`BCELoss` on probabilities p, whose Fisher matrix is that of the logits before a sigmoid.

    A term is `-w (y log p + (1 - y) log(1 - p))`: with the labels given its gradient is
    `w (p - y) / (p (1 - p))`, and the expectation of its second derivative `w / (p (1 - p))`.

    Attributes:
        weight: w, broadcast against the outputs, or None for ones.
    """

    weight: Tensor | None = None

    @classmethod
    def of(cls, loss: nn.BCELoss) -> Probabilities:
        """Read the options of a `BCELoss`."""
        weight = non_negative("BCELoss", "weight", loss.weight)
        return cls("BCELoss", loss.reduction, weight)

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Check that outputs and targets are probabilities, and the weights' shape."""
        super().check(outputs, targets)
        low, high = float(outputs.min()), float(outputs.max())
        if low < 0 or high > 1:
            raise ValueError(
                f"{self.name} needs probabilities, but the outputs run from {low:g} to {high:g}; "
                f"expected numbers from 0 to 1: let the model end with a sigmoid, or pass "
                f"BCEWithLogitsLoss, which does so itself"
            )
        check_fractions(self.name, targets)
        check_fits(self.name, "weight", self.weight, outputs)

    def curvature(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return `w / (p (1 - p))`."""
        del targets
        return self._weighted(1 / _variance(outputs))

    def relative_entropies(self, outputs: Tensor, targets: Tensor) -> Tensor | None:
        """Return the entropy of every element that has a weight, in bits."""
        del targets
        entropies = torch.special.entr(outputs) + torch.special.entr(1 - outputs)
        counts = self._weighted(torch.ones_like(outputs)) > 0
        found: Tensor = (entropies / math.log(2.0))[counts]
        return found

    def softened(self, outputs: Tensor, temperature: float) -> Tensor:
        """Return the probabilities of logits that are divided by the temperature."""
        smallest = torch.finfo(outputs.dtype).eps
        return torch.sigmoid(torch.logit(outputs, eps=smallest) / temperature)

    def sampled_vector(self, outputs: Tensor, targets: Tensor, generator: Generator) -> Tensor:
        """Return `√w (p - y) / (p (1 - p))` with labels y drawn from p."""
        del targets
        drawn = uniform(outputs.shape, outputs, generator) < outputs
        difference = torch.where(drawn, outputs - 1, outputs)
        roots = self._weighted(torch.ones_like(outputs)).sqrt()
        return roots * difference / _variance(outputs)

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return `w (p - y) / (p (1 - p))`."""
        return self._weighted((outputs - targets.to(outputs.dtype)) / _variance(outputs))

    def stand_in_targets(self, outputs: Tensor) -> Tensor:
        """Return zeros, since no matrix depends on the labels given."""
        return torch.zeros_like(outputs)

    def _weighted(self, values: Tensor) -> Tensor:
        return values if self.weight is None else values * self.weight.to(values)


def _variance(probabilities: Tensor) -> Tensor:
    return (probabilities * (1 - probabilities)).clamp_min(_SMALLEST_VARIANCE)
