"""Negative log-likelihood of outputs that are log-probabilities already."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from torch import Generator, Tensor, nn

from rotate_ewc.losses.categorical import Categorical, checked_class_weights

# Of the logarithm of the sum of all probabilities, also in half precision.
_TOLERANCE: Final = 0.05


@dataclass(frozen=True, eq=False)
class LogProbabilities(Categorical):
    """`NLLLoss` after `log_softmax`, whose Fisher matrix is that of cross-entropy before it.

    The columns v of a root of diag(p) - ppᵀ sum to zero, so that the Jacobian of `log_softmax`,
    `I - 1 pᵀ`, leaves them as they are: `(I - 1 pᵀ)ᵀ v = v`. They are the vectors on both sides.
    For the labels given the gradient is -q; what it becomes before `log_softmax` is `s p - q`.
    """

    @classmethod
    def of(cls, loss: nn.NLLLoss) -> LogProbabilities:  # type: ignore[override]
        """Read the options of an `NLLLoss`."""
        weights = checked_class_weights("NLLLoss", loss.weight)
        return cls("NLLLoss", loss.reduction, weights, loss.ignore_index)

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Check shapes and the range of labels."""
        if targets.is_floating_point():
            raise TypeError(
                f"{self.name} targets have dtype {targets.dtype}; expected class indices "
                f"(torch.long), or CrossEntropyLoss on the model's outputs before log_softmax"
            )
        super().check(outputs, targets)

    def exact_vectors(
        self, outputs: Tensor, targets: Tensor, num_examples: int
    ) -> Iterator[Tensor]:
        """Yield what cross-entropy does, for log-probabilities that sum to one."""
        self._check_normalized(outputs)
        return super().exact_vectors(outputs, targets, num_examples)

    def sampled_vector(self, outputs: Tensor, targets: Tensor, generator: Generator) -> Tensor:
        """Return what cross-entropy does, for log-probabilities that sum to one."""
        self._check_normalized(outputs)
        return super().sampled_vector(outputs, targets, generator)

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return `-q`."""
        return self._target_weights(outputs, targets).neg_()

    def softened(self, outputs: Tensor, temperature: float) -> Tensor:
        """Return the log-probabilities of the softened predictions, `log_softmax(f / T)`."""
        self._check_normalized(outputs.detach())
        return (outputs / temperature).log_softmax(dim=1)

    def _check_normalized(self, outputs: Tensor) -> None:
        found = outputs.float().logsumexp(dim=1).flatten()
        farthest = float(found[found.abs().argmax()])
        if abs(farthest) > _TOLERANCE:
            raise ValueError(
                f"{self.name} needs log-probabilities, but the probabilities of a prediction sum "
                f"to exp({farthest:g}); expected 1: let the model end with log_softmax over its "
                f"outputs' second axis, or pass CrossEntropyLoss, which does so itself"
            )
