"""Counts with a Poisson distribution."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from rotate_ewc.losses.draws import uniform
from rotate_ewc.losses.elementwise import Elementwise


@dataclass(frozen=True, eq=False)
class Poisson(Elementwise):
    """`PoissonNLLLoss`: outputs are rates r or their logarithms; any output shape.

    A term is `exp(f) - y f`, or `f - y log(f + ε)` without `log_input`; `full` adds a constant. The
    expectation of its second derivative is r, or `r / (r + ε)²`.

    Attributes:
        log_input: Whether outputs are logarithms of rates.
        eps: ε.
    """

    log_input: bool = True
    eps: float = 1e-8

    @classmethod
    def of(cls, loss: nn.PoissonNLLLoss) -> Poisson:
        """Read the options of a `PoissonNLLLoss`."""
        return cls("PoissonNLLLoss", loss.reduction, loss.log_input, loss.eps)

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Check shapes, and that rates are not negative."""
        super().check(outputs, targets)
        if not self.log_input and float(outputs.min()) < 0:
            raise ValueError(
                f"{self.name} with log_input=False needs rates, but the outputs go down to "
                f"{float(outputs.min()):g}; expected numbers of at least 0, or log_input=True"
            )

    def curvature(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the expectation over counts, which the counts given do not change."""
        del targets
        if self.log_input:
            return outputs.exp()
        return outputs / (outputs + self.eps).square()

    def sampled_vector(self, outputs: Tensor, targets: Tensor, generator: Generator) -> Tensor:
        """Return `r - y`, or `(r - y) / (r + ε)`, with counts y drawn from r."""
        del targets
        rates = outputs.exp() if self.log_input else outputs
        difference = rates - _drawn(rates, uniform(rates.shape, rates, generator))
        return difference if self.log_input else difference / (outputs + self.eps)

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return `exp(f) - y`, or `1 - y / (f + ε)`."""
        counts = targets.to(outputs.dtype)
        return outputs.exp() - counts if self.log_input else 1 - counts / (outputs + self.eps)

    def stand_in_targets(self, outputs: Tensor) -> Tensor:
        """Return zeros, since no matrix depends on the counts given."""
        return torch.zeros_like(outputs)


def _drawn(rates: Tensor, numbers: Tensor) -> Tensor:
    """Draw counts of given rates, with a number from 0 to 1 for each.

    Count k is drawn where the number is between the probabilities of less than k and of at most k,
    which is found by bisection.
    """
    wide, numbers = rates.double(), numbers.double()
    low, high = torch.full_like(wide, -1.0), (wide + 12 * wide.sqrt() + 40).ceil()
    while bool((high - low > 1).any()):
        middle = ((low + high) / 2).floor().clamp(min=0)
        enough = torch.special.gammaincc(middle + 1, wide) > numbers
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    return high.to(rates.dtype)
