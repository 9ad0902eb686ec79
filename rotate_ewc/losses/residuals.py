"""Losses of residuals that are quadratic near zero and linear beyond: Huber, smooth L1."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from rotate_ewc.losses.draws import uniform
from rotate_ewc.losses.elementwise import Elementwise


@dataclass(frozen=True, eq=False)
class Residual(Elementwise):
    """`HuberLoss` and `SmoothL1Loss`: the generalised Gauss-Newton matrix at the targets given.

    A term of the residual e is `c e² / 2` up to |e| = δ, and goes on with the slope `c δ`. So its
    second derivative is c there and 0 beyond, where only the sign of the residual counts: a model
    that is far off is not held. As a distribution the loss would have a second derivative that is
    the same for all residuals; that is not what is computed.

    Attributes:
        threshold: δ.
        scale: c; 1 for `HuberLoss`, 1/β for `SmoothL1Loss`, in which δ is β.
    """

    threshold: float = 1.0
    scale: float = 1.0

    @classmethod
    def of_huber(cls, loss: nn.HuberLoss) -> Residual:
        """Read the options of a `HuberLoss`."""
        return cls("HuberLoss", loss.reduction, loss.delta)

    @classmethod
    def of_smooth_l1(cls, loss: nn.SmoothL1Loss) -> Residual:
        """Read the options of a `SmoothL1Loss`."""
        scale = 1 / loss.beta if loss.beta else 1.0
        return cls("SmoothL1Loss", loss.reduction, loss.beta, scale)

    def curvature(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return c where the residual is in the quadratic part."""
        if not self.threshold:
            raise ValueError(
                f"{self.name} with beta=0 is the absolute error, which has no curvature; expected "
                f"beta above 0, or fisher_type='empirical'"
            )
        inside = (outputs - targets.to(outputs.dtype)).abs() < self.threshold
        return self.scale * inside.to(outputs.dtype)

    def sampled_vector(self, outputs: Tensor, targets: Tensor, generator: Generator) -> Tensor:
        """Return roots of the curvature with random signs, whose mean outer product it is.

        No labels are drawn: with residuals drawn from a distribution the matrix would be another.
        """
        roots = self.curvature(outputs, targets).sqrt()
        return torch.where(uniform(outputs.shape, outputs, generator) < 0.5, -roots, roots)

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return `c e`, at most `c δ` in size; the sign of e where δ is 0."""
        residuals = outputs - targets.to(outputs.dtype)
        if not self.threshold:
            return residuals.sign()
        return self.scale * residuals.clamp(-self.threshold, self.threshold)
