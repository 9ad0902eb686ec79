"""Loss functions → the vectors whose outer products make the Fisher matrix.

Every supported loss is the negative log-likelihood of a distribution over labels. For a batch of
outputs f, a likelihood yields vectors v of the shape of f such that, for each example n,

    Σ_v v_n v_nᵀ  =  Hessian of the example's summed loss with respect to f_n

exactly (`FisherType.TYPE2`) or in expectation (`FisherType.MC`). Back-propagating the vectors gives
per-example gradients whose outer products sum to the Fisher matrix of the summed loss; dividing by
the *mass*, which is what the reduction divides by, gives that of the loss itself.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from rotate_ewc.options import FisherType


@dataclass(frozen=True)
class Likelihood(ABC):
    """The distribution over labels behind a loss function.

    Attributes:
        name: Class name of the loss, for messages and snapshots.
        reduction: The loss's reduction, `"mean"` or `"sum"`.
    """

    name: str
    reduction: str

    @abstractmethod
    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Raise `ValueError` or `TypeError` unless outputs and targets fit the loss."""

    @abstractmethod
    def terms(self, outputs: Tensor) -> int:
        """Number of loss terms in a batch of outputs: what the reduction `mean` divides by."""

    @abstractmethod
    def rows(self, outputs: Tensor) -> int:
        """Number of predictions in a batch: outputs without their class or feature axis."""

    @abstractmethod
    def exact_vectors(self, outputs: Tensor, num_examples: int) -> Iterator[Tensor]:
        """Yield vectors whose outer products sum to the Hessian of the summed loss.

        Args:
            outputs: The model's outputs; an example owns `len(outputs) / num_examples` rows.
            num_examples: Number of examples. Each vector has at most one prediction for each of
                them, so that no cross-terms between the positions of an example come in.
        """

    @abstractmethod
    def sampled_vector(self, outputs: Tensor, generator: Generator) -> Tensor:
        """Return the summed loss's output gradient for labels drawn from the model."""

    @abstractmethod
    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the summed loss's gradient with respect to the outputs for given labels."""

    def vectors(
        self,
        outputs: Tensor,
        targets: Tensor,
        num_examples: int,
        fisher_type: FisherType,
        mc_samples: int,
        generator: Generator,
    ) -> Iterator[Tensor]:
        """Yield the vectors to back-propagate, each of the shape of the outputs.

        For `FisherType.EMPIRICAL` the one vector holds, for every example, the gradient of the loss
        (under its own reduction) of that example alone.
        """
        if fisher_type is FisherType.TYPE2:
            yield from self.exact_vectors(outputs, num_examples)
        elif fisher_type is FisherType.MC:
            for _ in range(mc_samples):
                yield self.sampled_vector(outputs, generator) / math.sqrt(mc_samples)
        else:
            terms_per_example = self.terms(outputs) / num_examples
            scale = terms_per_example if self.reduction == "mean" else 1.0
            yield self.gradient(outputs, targets) / scale

    def mass(self, outputs: Tensor, num_examples: int, fisher_type: FisherType) -> float:
        """Return what a batch adds to the number that the reduction `mean` divides by."""
        return num_examples if fisher_type is FisherType.EMPIRICAL else self.terms(outputs)


@dataclass(frozen=True)
class Categorical(Likelihood):
    """Softmax over classes: outputs `[N, C]` or `[N, C, ...]`, labels `[N]` or `[N, ...]`."""

    ignore_index: int = -100

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Check shapes, integer labels, and their range."""
        if outputs.ndim < 2:
            raise ValueError(
                f"{self.name} needs outputs [batch, classes, ...]; got {_shape(outputs)}"
            )
        expected = (outputs.shape[0], *outputs.shape[2:])
        if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
            raise TypeError(
                f"{self.name} targets have dtype {targets.dtype}; expected class indices "
                f"(torch.long). Class probabilities as targets are not supported"
            )
        if targets.shape != expected:
            raise ValueError(
                f"{self.name} outputs {_shape(outputs)} and targets {_shape(targets)} do not fit; "
                f"expected targets {list(expected)}"
            )
        if bool((targets == self.ignore_index).any()):
            raise ValueError(
                f"{self.name} targets contain ignore_index={self.ignore_index}, which is not "
                f"supported; remove those examples from the data"
            )
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= outputs.shape[1]:
            raise ValueError(
                f"{self.name} targets run from {low} to {high}; expected class indices from 0 to "
                f"{outputs.shape[1] - 1}, since the model has {outputs.shape[1]} outputs"
            )

    def terms(self, outputs: Tensor) -> int:
        """One term for each prediction."""
        return self.rows(outputs)

    def rows(self, outputs: Tensor) -> int:
        """All axes but the class axis."""
        return outputs.numel() // outputs.shape[1]

    def exact_vectors(self, outputs: Tensor, num_examples: int) -> Iterator[Tensor]:
        """Yield `√p_c (e_c - p)` for every class c at every position."""
        probabilities = outputs.softmax(dim=1)
        num_classes = outputs.shape[1]
        rows = outputs.shape[0] // num_examples
        axes = (range(rows), *map(range, outputs.shape[2:]))
        for row, *position in itertools.product(*axes):
            at_position: tuple[Any, ...] = (slice(row, None, rows), slice(None), *position)
            p = probabilities[at_position]
            for c in range(num_classes):
                vector = torch.zeros_like(outputs)
                one_hot = F.one_hot(torch.tensor(c, device=p.device), num_classes)
                vector[at_position] = p[:, c : c + 1].sqrt() * (one_hot - p)
                yield vector

    def sampled_vector(self, outputs: Tensor, generator: Generator) -> Tensor:
        """Return `p - e_y` with labels y drawn from p."""
        probabilities = outputs.softmax(dim=1)
        rows = probabilities.movedim(1, -1).flatten(0, -2)
        drawn = torch.multinomial(rows, 1, generator=generator)
        labels = drawn.view(outputs.shape[0], *outputs.shape[2:])
        return probabilities - _one_hot(labels, outputs)

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return `p - e_y`."""
        return outputs.softmax(dim=1) - _one_hot(targets, outputs)


@dataclass(frozen=True)
class _Elementwise(Likelihood):
    """Losses with one independent term for each element of the outputs."""

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Check that targets are floating-point and of the outputs' shape."""
        if not targets.is_floating_point():
            raise TypeError(
                f"{self.name} targets have dtype {targets.dtype}; expected floating-point"
            )
        if outputs.shape != targets.shape:
            raise ValueError(
                f"{self.name} outputs {_shape(outputs)} and targets {_shape(targets)} do not fit; "
                f"expected the same shape"
            )

    def terms(self, outputs: Tensor) -> int:
        """One term for each element."""
        return outputs.numel()

    def rows(self, outputs: Tensor) -> int:
        """All axes but the last; a batch of scalars has one row for each."""
        return outputs.numel() // (outputs.shape[-1] if outputs.ndim > 1 else 1)

    @abstractmethod
    def curvature(self, outputs: Tensor) -> Tensor:
        """Second derivative of every term with respect to its output element."""

    def exact_vectors(self, outputs: Tensor, num_examples: int) -> Iterator[Tensor]:
        """Yield, for every element of an example's output, the root of its curvature."""
        roots = self.curvature(outputs).sqrt().reshape(num_examples, -1)
        for element in range(roots.shape[1]):
            vector = torch.zeros_like(roots)
            vector[:, element] = roots[:, element]
            yield vector.view_as(outputs)


@dataclass(frozen=True)
class Gaussian(_Elementwise):
    """Squared error without a factor ½: unit curvature 2, any output shape."""

    def curvature(self, outputs: Tensor) -> Tensor:
        """Return 2 for every element."""
        return torch.full_like(outputs, 2.0)

    def sampled_vector(self, outputs: Tensor, generator: Generator) -> Tensor:
        """Return `√2 ε`: labels are drawn with the variance ½ that the loss implies."""
        noise = torch.randn(
            outputs.shape, generator=generator, device=outputs.device, dtype=outputs.dtype
        )
        return math.sqrt(2.0) * noise

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return `2 (f - y)`."""
        return 2.0 * (outputs - targets.to(outputs.dtype))


@dataclass(frozen=True)
class Bernoulli(_Elementwise):
    """Sigmoid outputs with binary labels, any output shape."""

    def curvature(self, outputs: Tensor) -> Tensor:
        """Return `σ (1 - σ)`, as a product of two sigmoids to stay exact for large logits."""
        return torch.sigmoid(outputs) * torch.sigmoid(-outputs)

    def sampled_vector(self, outputs: Tensor, generator: Generator) -> Tensor:
        """Return `σ - y` with labels y drawn from σ."""
        probabilities = torch.sigmoid(outputs)
        return probabilities - torch.bernoulli(probabilities, generator=generator)

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return `σ - y`."""
        return torch.sigmoid(outputs) - targets.to(outputs.dtype)


_FUNCTIONAL: Final[dict[Callable[..., Any], type[nn.Module]]] = {
    F.cross_entropy: nn.CrossEntropyLoss,
    F.mse_loss: nn.MSELoss,
    F.binary_cross_entropy_with_logits: nn.BCEWithLogitsLoss,
}


def likelihood_of(loss_func: Callable[..., Any]) -> Likelihood:
    """Return the likelihood behind a loss function.

    Args:
        loss_func: A `CrossEntropyLoss`, `MSELoss` or `BCEWithLogitsLoss` with reduction `"mean"` or
            `"sum"`, or its functional twin with default arguments (such as `F.cross_entropy`).

    Raises:
        ValueError: If the loss, its reduction or one of its options is not supported.
    """
    loss = loss_func
    if not isinstance(loss, nn.Module) and loss in _FUNCTIONAL:
        loss = _FUNCTIONAL[loss]()
    kind, name = type(loss), type(loss).__name__
    if kind not in (nn.CrossEntropyLoss, nn.MSELoss, nn.BCEWithLogitsLoss):
        described = name if isinstance(loss, nn.Module) else repr(loss_func)
        raise ValueError(
            f"loss_func is {described}, which is not supported; expected "
            f"CrossEntropyLoss, MSELoss or BCEWithLogitsLoss from torch.nn"
        )
    reduction = getattr(loss, "reduction", None)
    if reduction not in ("mean", "sum"):
        raise ValueError(
            f"loss_func {name} has reduction={reduction!r}; expected 'mean' or 'sum', because the "
            f"scale of the Fisher matrix follows from the reduction"
        )
    for option in ("weight", "pos_weight", "label_smoothing"):
        value = getattr(loss, option, None)
        if isinstance(value, Tensor) or value not in (None, 0.0):
            raise ValueError(
                f"loss_func {name} has {option} set, which is not supported; "
                f"pass a {name} without it"
            )
    if isinstance(loss, nn.CrossEntropyLoss):
        return Categorical(name, reduction, ignore_index=loss.ignore_index)
    return (Gaussian if kind is nn.MSELoss else Bernoulli)(name, reduction)


def _one_hot(labels: Tensor, outputs: Tensor) -> Tensor:
    """Return labels `[N, ...]` as one-hot vectors `[N, C, ...]` in the outputs' dtype."""
    return F.one_hot(labels.long(), outputs.shape[1]).movedim(-1, 1).to(outputs.dtype)


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))
