"""What a loss must provide: vectors whose outer products sum to the Fisher matrix.

A loss is the negative log-likelihood of a distribution over labels. For a batch of outputs f, a
likelihood yields vectors v of the shape of f such that, for each example n,

    Σ_v v_n v_nᵀ  =  Hessian of the example's summed loss with respect to f_n

exactly (`FisherType.TYPE2`) or in expectation (`FisherType.MC`, and `FisherType.EMPIRICAL` if the
given labels are distributed as the model predicts). Back-propagating the vectors gives per-example
gradients whose outer products sum to the Fisher matrix of the summed loss. Dividing it by the sum
of the *terms*, by which the reduction `mean` divides, gives the matrix of the mean loss.
"""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Generator, Tensor

from rotate_ewc._utils.numerics import statistics_dtype
from rotate_ewc.options import FisherType


class BatchForm(Enum):
    """The form of a batch of data that a loss expects.

    `TENSOR`: inputs and targets, where the targets are one tensor (or None, for unlabelled data);
    `PAIR`: inputs and targets of any structure; `INPUTS`: inputs alone.
    """

    TENSOR = "tensor"
    PAIR = "pair"
    INPUTS = "inputs"


@dataclass(frozen=True, eq=False)
class Likelihood(ABC):
    """The distribution over labels behind a loss function.

    To add a loss to the package, subclass this with three methods, `exact_vectors`,
    `sampled_vector` and `gradient`, and register it with `register_likelihood`. Add `terms` if
    `mean` does not simply count the rows of the outputs, and `relative_entropies` if predictions
    can be softened. Outputs arrive detached, in float32 or better.

    Attributes:
        name: Class name of the loss, for messages and snapshots.
        reduction: The loss's reduction, `"mean"` or `"sum"`.

    Examples:
        Waiting times with outputs `log rate`, whose mean Hessian is 1:

        >>> import torch
        >>> from torch import nn
        >>> from rotate_ewc import EKFACLinearOperator, Likelihood, register_likelihood
        >>> class ExponentialLoss(nn.Module):
        ...     def forward(self, outputs, targets):
        ...         return (outputs.exp() * targets - outputs).mean()
        >>> class Exponential(Likelihood):
        ...     def exact_vectors(self, outputs, targets, num_examples):
        ...         for element in range(outputs.shape[1]):
        ...             vector = torch.zeros_like(outputs)
        ...             vector[:, element] = 1
        ...             yield vector
        ...     def sampled_vector(self, outputs, targets, generator):
        ...         return torch.empty_like(outputs).exponential_(generator=generator) - 1
        ...     def gradient(self, outputs, targets):
        ...         return outputs.exp() * targets - 1
        ...     def terms(self, outputs, targets):
        ...         return torch.full_like(outputs[:, 0], outputs.shape[1])
        >>> register_likelihood(ExponentialLoss, lambda loss: Exponential("Exponential", "mean"))
        >>> model = nn.Linear(3, 2)
        >>> data = [(torch.randn(8, 3), torch.ones(8, 2))]
        >>> params = list(model.parameters())
        >>> EKFACLinearOperator(model, ExponentialLoss(), params, data).shape
        (8, 8)
    """

    name: str
    reduction: str

    @property
    def batch_form(self) -> BatchForm:
        """What a batch of data is."""
        return BatchForm.TENSOR

    @property
    def user_functions(self) -> tuple[Callable[..., Any], ...]:
        """The user's functions that the loss calls; their modules are put into eval mode."""
        return ()

    @property
    def final_reduction(self) -> str:
        """The reduction, once all data have been seen."""
        return self.reduction

    @property
    def current(self) -> Likelihood:
        """The likelihood for outputs of the same structure as in the last forward pass."""
        return self

    def packing_forward(self, forward: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Return a forward function with one output tensor, if the loss takes several."""
        return forward

    def parts_of_batch(
        self, forward: Callable[[Any], Any], inputs: Any, num_examples: Callable[[Any], int] | None
    ) -> Iterator[Any]:
        """Yield the inputs of a batch, or of each example if examples must be processed alone."""
        del forward, num_examples
        yield inputs

    @abstractmethod
    def exact_vectors(
        self, outputs: Tensor, targets: Tensor, num_examples: int
    ) -> Iterator[Tensor]:
        """Yield vectors whose outer products sum to the Hessian of the summed loss.

        Args:
            outputs: The model's outputs; an example owns `len(outputs) / num_examples` rows.
            targets: The given labels, on which weights may depend.
            num_examples: Number of examples. A vector may have at most one prediction for each of
                them; otherwise there would be cross-terms between the positions of an example.
        """

    @abstractmethod
    def sampled_vector(self, outputs: Tensor, targets: Tensor, generator: Generator) -> Tensor:
        """Return the summed loss's output gradient for labels drawn from the model."""

    @abstractmethod
    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the summed loss's gradient with respect to the outputs for the labels given."""

    def terms(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return what each row adds to the number that `mean` divides by, `[len(outputs)]`."""
        return torch.ones_like(outputs.reshape(len(outputs), -1)[:, 0])

    def num_terms(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return what a batch adds to the number that `mean` divides by, a scalar."""
        # Counted in float32 or better: bfloat16 cannot represent 257.
        return self.terms(outputs.to(statistics_dtype(outputs.dtype)), targets).sum()

    def relative_entropies(self, outputs: Tensor, targets: Tensor) -> Tensor | None:
        """Return how uncertain the predictions are, as `temperature="auto"` measures it.

        Returns:
            The entropy of every prediction that counts in the loss, divided by the largest
            possible, `[predictions]`; None if dividing outputs softens nothing, as in regression.
        """
        del outputs, targets
        return None

    def softened(self, outputs: Tensor, temperature: float) -> Tensor:
        """Return the outputs of predictions softened by a temperature T.

        The Fisher matrix at these outputs, times T², is that of the softened snapshot.

        Args:
            outputs: The model's outputs, attached to the autograd graph.
            temperature: T.
        """
        return outputs / temperature

    @property
    def has_distribution(self) -> bool:
        """Whether the distribution of labels is known, and not only gradients of the loss."""
        return True

    @property
    def can_be_softened(self) -> bool:
        """Whether predictions have an entropy, so that a temperature makes sense."""
        return type(self).relative_entropies is not Likelihood.relative_entropies

    def stand_in_targets(self, outputs: Tensor) -> Tensor | None:
        """Return targets for unlabelled data; None if the exact matrix depends on the targets."""
        del outputs
        return None

    def completed_targets(self, outputs: Tensor, targets: Any, fisher_type: FisherType) -> Any:
        """Return a batch's targets, or substitutes if it has none and none are needed.

        Raises:
            ValueError: If the batch has none, and the matrix depends on them.
        """
        if targets is not None:
            return targets
        found = None
        if fisher_type is not FisherType.EMPIRICAL:
            found = self.stand_in_targets(outputs)
        if found is None:
            raise ValueError(
                f"the batch has no targets, but the matrix of {self.name} with fisher_type "
                f"{fisher_type!r} depends on them; expected (inputs, targets)"
            )
        return found

    @property
    def observed(self) -> dict[str, Any]:
        """What is known about the loss from the batches so far, by names for messages."""
        return {}

    def take_over(self, observed: Mapping[str, Any]) -> None:
        """Take over what other processes have observed."""
        del observed

    @property
    def has_counts(self) -> bool:
        """Whether `counts` must be summed over all data before the first vector."""
        return False

    def counts(self, outputs: Tensor, targets: Any) -> Tensor:
        """Return what a batch adds to the counts."""
        del targets
        return outputs.new_zeros(0)

    def with_counts(self, counts: Tensor) -> Likelihood:
        """Return the likelihood for data with these counts."""
        del counts
        return self

    def predictions(self, outputs: Tensor) -> int:
        """Number of predictions (such as tokens) in a batch of outputs."""
        return len(outputs)

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Raise `ValueError` or `TypeError` unless outputs and targets fit the loss."""
        del outputs, targets

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

        They belong to the summed loss `L = Σ_n L_n`, whatever the reduction. The mean loss is L
        divided by the sum M of the terms, so its matrix is `Σ_n E[∇L_n ∇L_nᵀ] / M`, however the
        terms are distributed among the examples. `FisherType.EMPIRICAL` uses the given labels
        instead of the expectation. For labels drawn from the model, all Fisher types agree in
        expectation, because the terms of an example then have independent gradients of mean zero.
        With weights or smoothed labels, a loss is not a log-likelihood and the types differ:
        `EMPIRICAL` contains the squares of the weights.
        """
        if fisher_type is FisherType.TYPE2:
            yield from self.exact_vectors(outputs, targets, num_examples)
        elif fisher_type is FisherType.MC:
            drawn: Callable[..., Tensor] = self.sampled_vector
            if "torch._dynamo" in sys.modules:
                # The caller may be compiled; torch.compile supports only the default generator.
                disable: Callable[[Any], Any] = torch.compiler.disable
                drawn = disable(drawn)
            for _ in range(mc_samples):
                yield drawn(outputs, targets, generator) / math.sqrt(mc_samples)
        else:
            yield self.gradient(outputs, targets)


def non_negative(loss: str, option: str, value: Tensor | None) -> Tensor | None:
    """Return an option of a loss; raise `ValueError` if a number is negative or not finite."""
    if value is not None and not bool((torch.isfinite(value) & (value >= 0)).all()):
        raise ValueError(
            f"loss_func {loss} has {option} {value.tolist()}; expected finite numbers of at least 0"
        )
    return value


def shape_of(tensor: Tensor) -> str:
    """Format a tensor's shape for messages."""
    return str(list(tensor.shape))
