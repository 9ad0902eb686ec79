"""A Gaussian whose variance is predicted, or given with the targets."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

from rotate_ewc._utils.structure import packed_like
from rotate_ewc.losses.base import shape_of
from rotate_ewc.losses.draws import normal
from rotate_ewc.losses.elementwise import one_element_each
from rotate_ewc.losses.structured import Structured


@dataclass(frozen=True, eq=False)
class GaussianVariance(Structured):
    """`GaussianNLLLoss`: outputs (mean, variance), or outputs mean and targets (target, variance).

    A term is `(log v + (m - y)² / v) / 2`. The Fisher matrix has 1/v for every mean and, for every
    variance, 1/(2 v²) for each element that shares it, and nothing between them.

    Attributes:
        eps: The least variance; as in PyTorch, smaller ones count as this and get gradients.
    """

    eps: float = 1e-6

    @classmethod
    def of(cls, loss: nn.GaussianNLLLoss) -> GaussianVariance:
        """Read the options of a `GaussianNLLLoss`."""
        return cls("GaussianNLLLoss", loss.reduction, eps=loss.eps)

    def chosen(self, outputs: Any) -> Any:
        """Check that there are a mean and, or not, a variance."""
        pair = isinstance(outputs, (tuple, list)) and len(outputs) == 2
        if not isinstance(outputs, Tensor) and not (
            pair and all(isinstance(output, Tensor) for output in outputs)
        ):
            raise TypeError(
                f"model returned {type(outputs).__name__} for {self.name}; expected a tuple (mean, "
                f"variance), or a tensor of means with targets (target, variance): pass forward=, "
                f"a function from a batch's inputs to one of these"
            )
        return outputs

    def check(self, outputs: Tensor, targets: Any) -> None:
        """Check targets, and the shape and the sign of variances."""
        mean, variance, target = self._parts(outputs, targets)
        if not target.is_floating_point():
            raise TypeError(f"{self.name} targets have dtype {target.dtype}; expected floats")
        if mean.shape != target.shape:
            raise ValueError(
                f"{self.name} outputs {shape_of(mean)} and targets {shape_of(target)} do not fit; "
                f"expected the same shape"
            )
        if float(variance.min()) < 0:
            raise ValueError(
                f"{self.name} variances go down to {float(variance.min()):g}; expected numbers of "
                f"at least 0, such as those of a softplus"
            )

    def terms(self, outputs: Tensor, targets: Any) -> Tensor:
        """One term for each mean."""
        mean = self._mean(outputs)
        return torch.full_like(
            outputs.reshape(len(outputs), -1)[:, 0], mean.numel() // len(outputs)
        )

    def predictions(self, outputs: Tensor) -> int:
        """All axes of the means but the last; a batch of scalars has one for each."""
        mean = self._mean(outputs)
        return mean.numel() // (mean.shape[-1] if mean.ndim > 1 else 1)

    def exact_vectors(self, outputs: Tensor, targets: Any, num_examples: int) -> Iterator[Tensor]:
        """Yield one vector for each mean and each variance of an example."""
        mean, variance, _ = self._parts(outputs, targets)
        known = variance.clamp_min(self.eps)
        roots = (1 / known).sqrt().expand_as(mean)
        if self._predicts_variance:
            shared = mean.numel() / variance.numel()
            roots = self._packed(outputs, roots, math.sqrt(shared / 2) / known)
        yield from one_element_each(roots, num_examples, outputs.shape)

    def sampled_vector(self, outputs: Tensor, targets: Any, generator: Generator) -> Tensor:
        """Return the gradient for targets drawn with the mean and variance."""
        mean, variance, _ = self._parts(outputs, targets)
        noise = normal(mean.shape, mean, generator)
        return self._gradient(outputs, variance.clamp_min(self.eps), noise, variance.shape)

    def gradient(self, outputs: Tensor, targets: Any) -> Tensor:
        """Return `(m - y) / v` for means, and `(1 - (m - y)² / v) / (2 v)` for variances."""
        mean, variance, target = self._parts(outputs, targets)
        known = variance.clamp_min(self.eps)
        noise = (target.to(mean.dtype) - mean) / known.sqrt()
        return self._gradient(outputs, known, noise, variance.shape)

    def stand_in_targets(self, outputs: Tensor) -> Tensor | None:
        """Return zeros where variances are predicted, since no matrix depends on the targets."""
        return torch.zeros_like(self._mean(outputs)) if self._predicts_variance else None

    @property
    def _predicts_variance(self) -> bool:
        return self.packing is not None

    def _mean(self, outputs: Tensor) -> Tensor:
        found = self.unpacked(outputs)
        mean: Tensor = found[0] if self._predicts_variance else found
        return mean

    def _parts(self, outputs: Tensor, targets: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Return means; variances that can be broadcast to them; and targets."""
        if self._predicts_variance:
            mean, variance = self.unpacked(outputs)
            target = targets
            if not isinstance(target, Tensor):
                raise TypeError(
                    f"{self.name} has variances among the outputs and targets of type "
                    f"{type(target).__name__}; expected a tensor"
                )
        else:
            pair = isinstance(targets, (tuple, list)) and len(targets) == 2
            if not pair or not all(isinstance(target, Tensor) for target in targets):
                raise TypeError(
                    f"{self.name} has no variances among the outputs, and targets of type "
                    f"{type(targets).__name__}; expected outputs (mean, variance), or targets "
                    f"(target, variance)"
                )
            mean, (target, variance) = outputs, targets
            variance = variance.to(mean.dtype)
        if variance.shape == mean.shape[:-1] and variance.shape != mean.shape:
            variance = variance.unsqueeze(-1)
        differing = [v for v, m in zip(variance.shape, mean.shape, strict=False) if v != m]
        if variance.ndim != mean.ndim or differing not in ([], [1]):
            raise ValueError(
                f"{self.name} means {shape_of(mean)} and variances {shape_of(variance)} do not "
                f"fit; expected the same shape, one axis of size 1, or no last axis"
            )
        return mean, variance, target

    def _gradient(self, outputs: Tensor, known: Tensor, noise: Tensor, shape: torch.Size) -> Tensor:
        """Return the gradient for targets that are noise times the deviation away."""
        of_mean = -noise / known.sqrt()
        if not self._predicts_variance:
            return of_mean
        of_variance = ((1 - noise.square()) / (2 * known)).sum_to_size(shape)
        return self._packed(outputs, of_mean, of_variance)

    def _packed(self, outputs: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        """Return vectors of means and variances as the outputs are packed."""
        return packed_like((mean, variance), len(outputs))
