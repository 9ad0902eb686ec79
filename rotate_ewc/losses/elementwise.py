"""Losses with one independent term for each output element: squared error, binary cross-entropy."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from rotate_ewc.losses.base import Likelihood, non_negative, shape_of
from rotate_ewc.losses.draws import normal, uniform


@dataclass(frozen=True, eq=False)
class Elementwise(Likelihood):
    """Losses whose Hessian is diagonal."""

    @abstractmethod
    def curvature(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Second derivative of every term with respect to its output element."""

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Check that targets are floating-point and of the outputs' shape."""
        if not targets.is_floating_point():
            raise TypeError(
                f"{self.name} targets have dtype {targets.dtype}; expected floating-point"
            )
        if outputs.shape != targets.shape:
            raise ValueError(
                f"{self.name} outputs {shape_of(outputs)} and targets {shape_of(targets)} do not "
                f"fit; expected the same shape"
            )

    def terms(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """One term for each element."""
        del targets
        rows = outputs.reshape(len(outputs), -1)
        return torch.full_like(rows[:, 0], rows.shape[1])

    def predictions(self, outputs: Tensor) -> int:
        """All axes but the last; a batch of scalars has one prediction for each."""
        return outputs.numel() // (outputs.shape[-1] if outputs.ndim > 1 else 1)

    def exact_vectors(
        self, outputs: Tensor, targets: Tensor, num_examples: int
    ) -> Iterator[Tensor]:
        """Yield, for every element of an example's output, the root of its curvature."""
        roots = self.curvature(outputs, targets).sqrt()
        yield from one_element_each(roots, num_examples, outputs.shape)


@dataclass(frozen=True, eq=False)
class Gaussian(Elementwise):
    """Squared error without a factor ½: unit curvature 2, any output shape."""

    @classmethod
    def of(cls, loss: nn.MSELoss) -> Gaussian:
        """Read the options of an `MSELoss`."""
        return cls("MSELoss", loss.reduction)

    def curvature(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return 2 for every element."""
        del targets
        return torch.full_like(outputs, 2.0)

    def sampled_vector(self, outputs: Tensor, targets: Tensor, generator: Generator) -> Tensor:
        """Return `√2 ε`: labels are drawn with the variance ½ that the loss implies."""
        del targets
        return math.sqrt(2.0) * normal(outputs.shape, outputs, generator)

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return `2 (f - y)`."""
        return 2.0 * (outputs - targets.to(outputs.dtype))

    def stand_in_targets(self, outputs: Tensor) -> Tensor:
        """Return zeros, since no matrix depends on the targets given."""
        return torch.zeros_like(outputs)


@dataclass(frozen=True, eq=False)
class Bernoulli(Elementwise):
    """Sigmoid outputs with labels y in [0, 1], any output shape.

    A term is `-w (c y log σ + (1 - y) log(1 - σ))` with weights w and positive weights c; with
    `s = w (c y + 1 - y)` its gradient is `s σ - w c y` and its curvature `s σ (1 - σ)`.

    Attributes:
        weight: w, broadcast against the outputs, or None for ones.
        pos_weight: c, likewise.
    """

    weight: Tensor | None = None
    pos_weight: Tensor | None = None

    @classmethod
    def of(cls, loss: nn.BCEWithLogitsLoss) -> Bernoulli:
        """Read the options of a `BCEWithLogitsLoss`."""
        for option, value in (("weight", loss.weight), ("pos_weight", loss.pos_weight)):
            non_negative("BCEWithLogitsLoss", option, value)
        return cls("BCEWithLogitsLoss", loss.reduction, loss.weight, loss.pos_weight)

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Check targets, and that the weights can be broadcast against the outputs."""
        super().check(outputs, targets)
        check_fractions(self.name, targets)
        for option, value in (("weight", self.weight), ("pos_weight", self.pos_weight)):
            check_fits(self.name, option, value, outputs)

    def curvature(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return `s σ (1 - σ)`, as a product of two sigmoids to stay exact for large logits."""
        strength = self._strength(outputs, targets)
        return strength * torch.sigmoid(outputs) * torch.sigmoid(-outputs)

    def relative_entropies(self, outputs: Tensor, targets: Tensor) -> Tensor | None:
        """Return the entropy of every element that has a weight, in bits."""
        sides = torch.sigmoid(torch.stack([outputs, -outputs]))
        entropies: Tensor = torch.special.entr(sides).sum(dim=0) / math.log(2.0)
        return entropies[self._strength(outputs, targets).expand_as(entropies) > 0]

    def sampled_vector(self, outputs: Tensor, targets: Tensor, generator: Generator) -> Tensor:
        """Return `√s (σ - y)` with labels y drawn from σ."""
        probabilities = torch.sigmoid(outputs)
        drawn = uniform(outputs.shape, outputs, generator) < probabilities
        # σ(x) - 1 is -σ(-x), which has all digits also where σ(x) is next to one.
        difference = torch.where(drawn, -torch.sigmoid(-outputs), probabilities)
        return self._strength(outputs, targets).sqrt() * difference

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return `s σ - w c y`, written as `w ((1 - y) σ(x) - c y σ(-x))` to stay exact."""
        labels = targets.to(outputs.dtype)
        positive = labels if self.pos_weight is None else labels * self.pos_weight.to(outputs)
        gradient = (1 - labels) * torch.sigmoid(outputs) - positive * torch.sigmoid(-outputs)
        return gradient if self.weight is None else gradient * self.weight.to(outputs)

    def stand_in_targets(self, outputs: Tensor) -> Tensor | None:
        """Return zeros, without positive weights, which depend on the labels given."""
        return torch.zeros_like(outputs) if self.pos_weight is None else None

    def _strength(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return s, of the outputs' shape."""
        labels = targets.to(outputs.dtype)
        strength = torch.ones_like(outputs)
        if self.pos_weight is not None:
            strength = 1 + (self.pos_weight.to(outputs) - 1) * labels
        return strength if self.weight is None else strength * self.weight.to(outputs)


def one_element_each(roots: Tensor, num_examples: int, shape: torch.Size) -> Iterator[Tensor]:
    """Yield, for every element of an example's output, a vector of this shape with that alone."""
    roots = roots.reshape(num_examples, -1)
    for element in range(roots.shape[1]):
        vector = torch.zeros_like(roots)
        vector[:, element] = roots[:, element]
        yield vector.view(shape)


def check_fractions(loss: str, targets: Tensor) -> None:
    """Raise `ValueError` unless targets are from 0 to 1."""
    if not bool(((targets >= 0) & (targets <= 1)).all()):
        raise ValueError(
            f"{loss} targets run from {float(targets.min()):g} to "
            f"{float(targets.max()):g}; expected numbers from 0 to 1"
        )


def check_fits(loss: str, option: str, value: Tensor | None, outputs: Tensor) -> None:
    """Raise `ValueError` unless a loss's option can be broadcast against the outputs."""
    if value is not None and not _fits(value, outputs):
        raise ValueError(
            f"{loss} {option} of shape {shape_of(value)} cannot be broadcast against "
            f"a batch's outputs {shape_of(outputs)}; expected one number for each output "
            f"(a weight for each example cannot be cut into batches)"
        )


def _fits(factor: Tensor, outputs: Tensor) -> bool:
    try:
        factor.expand_as(outputs)
    except RuntimeError:
        return False
    return True
