"""Losses that a model computes itself, as functions of the model and a whole batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rotate_ewc._utils.structure import mapped, tensors_of
from rotate_ewc.errors import NotFiniteError
from rotate_ewc.losses.base import BatchForm
from rotate_ewc.losses.gradients_only import GradientsOnly, UserLoss
from rotate_ewc.options import FisherType


class ModelLoss(UserLoss):
    """A loss as a function of a model and a batch, for `fisher_type="empirical"`.

    The function gets whole batches, as the data yield them. If it returns a loss for each example,
    a batch takes one backward pass. If it returns one number, each example goes through the model
    alone, which is as exact but slower. The loss of the batch must then be the mean or the sum of
    the examples' losses (this is measured) or, with `terms`, the mean over their terms.

    Examples:
        >>> from rotate_ewc import ModelLoss
        >>> loss = ModelLoss(
        ...     lambda model, batch: model(**batch).loss,
        ...     terms=lambda batch: (batch["labels"][:, 1:] != -100).sum(dim=1),
        ... )
    """

    def __init__(
        self,
        function: Callable[[Any, Any], Tensor],
        *,
        terms: Callable[[Any], Tensor] | None = None,
        reduction: str | None = None,
    ) -> None:
        """Take a function.

        Args:
            function: From the model and a batch to the loss: one number, or one or more for each
                example. The model is what `forward=` or `model_func` is, if one is passed.
            terms: From a batch to what the mean divides by, a number (or more) for each example.
                None: one for each number that the loss has, or for each example.
            reduction: How several numbers for a batch are reduced: `"mean"` (the same as None) or
                `"sum"`. For a single number it is measured, unless `terms` is given.

        Raises:
            TypeError: If `function` or `terms` cannot be called.
            ValueError: If the reduction is another.
        """
        super().__init__(function, terms=terms, reduction=reduction)

    def __call__(self, model: Any, batch: Any) -> Tensor:
        """Return the loss, for training."""
        return self.function(model, batch)


@dataclass
class Progress:
    """What is known of a loss, and of the batch at hand.

    Attributes:
        reduction: `"mean"` or `"sum"`; None before it was decided.
        several: Whether the loss has several numbers for a batch; None before the first.
        batch: The batch, or the example, that the model was run on last.
        ndim: Number of axes of its loss.
        precision: Of its dtype.
        values: The losses of the examples of the batch so far.
    """

    reduction: str | None = None
    several: bool | None = None
    batch: Any = None
    ndim: int = 0
    precision: float = 0.0
    values: list[float] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class OwnLosses(GradientsOnly):
    """The outputs are the losses, and all that there is to back-propagate is their sum.

    Attributes:
        loss: The loss with its options.
        progress: What is known so far.
    """

    loss: ModelLoss = field(default_factory=lambda: ModelLoss(torch.sum))
    progress: Progress = field(default_factory=Progress)

    @classmethod
    def of(cls, loss: ModelLoss) -> OwnLosses:
        """Take a loss."""
        name = getattr(loss.function, "__name__", type(loss.function).__name__)
        reduction = loss.reduction or ("mean" if loss.terms is not None else None)
        progress = Progress(reduction)
        return cls(f"ModelLoss({name})", "mean", loss, progress)

    @property
    def batch_form(self) -> BatchForm:
        """Batches are given to the function as they are."""
        return BatchForm.INPUTS

    @property
    def final_reduction(self) -> str:
        """The reduction that was measured."""
        return self.progress.reduction or "mean"

    @property
    def observed(self) -> dict[str, Any]:
        """The reduction, and whether it was one number, where they are known."""
        found = {"reduction": self.progress.reduction, "several numbers": self.progress.several}
        return {name: value for name, value in found.items() if value is not None}

    def take_over(self, observed: Mapping[str, Any]) -> None:
        """Take over the reduction."""
        self.progress.reduction = observed.get("reduction")

    def packing_forward(self, forward: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Return a function from a batch to the losses of its examples."""

        # Without `__wrapped__`: it is not the model that gets the batch.
        def losses(batch: Any) -> Any:
            value = self.loss.function(forward, batch)
            if not isinstance(value, Tensor) or not value.is_floating_point():
                raise TypeError(
                    f"{self.name} returned {type(value).__name__}; expected a floating-point tensor"
                )
            self.progress.batch, self.progress.ndim = batch, value.ndim
            self.progress.precision = torch.finfo(value.dtype).eps
            if value.ndim:
                return value
            if not self._own_terms(batch).any():
                # The mean over no terms is not a number; no gradient is to come of it.
                return value.new_zeros(1)
            if not bool(torch.isfinite(value)):
                raise NotFiniteError(
                    f"{self.name} is {float(value.detach())}; expected a finite number. If a "
                    f"single example has no labels that count, pass ModelLoss(loss, "
                    f"terms=...) with a function that counts the terms of each example"
                )
            return value.reshape(1)

        return losses

    def parts_of_batch(
        self, forward: Callable[[Any], Any], inputs: Any, num_examples: Callable[[Any], int] | None
    ) -> Iterator[Any]:
        """Yield a batch, or its examples where the loss is one number.

        Raises:
            ValueError: If that is neither the mean nor the sum of those of the examples.
        """
        if self.progress.several:
            yield inputs
            return
        count = _count(inputs, num_examples)
        with torch.no_grad():
            value = forward(inputs)
        several = self.progress.ndim > 0
        if self.progress.several not in (None, several):
            raise ValueError(
                f"{self.name} returned one number for some batches and several for others; "
                f"expected the same for all"
            )
        self.progress.several = several
        if several:
            yield inputs
            return
        self.progress.values = []
        for example in range(count):
            yield _example(inputs, example, count)
        self._check_reduction(forward, inputs, float(value), count)

    def completed_targets(self, outputs: Tensor, targets: Any, fisher_type: FisherType) -> Any:
        """There are no targets."""
        del outputs, targets, fisher_type

    def check(self, outputs: Tensor, targets: Any) -> None:
        """Note an example's loss, to be compared with that of its batch."""
        del targets
        if not self.progress.several:
            self.progress.values.append(float(outputs))

    def num_terms(self, outputs: Tensor, targets: Any) -> Tensor:
        """Count the terms as the user does, or the losses."""
        del targets
        if self.loss.terms is None:
            return torch.tensor(float(outputs.numel()), dtype=torch.float64)
        return self._own_terms(self.progress.batch).sum()

    def gradient(self, outputs: Tensor, targets: Any) -> Tensor:
        """Return ones, or the number of terms of an example's mean."""
        del targets
        if self.progress.several:
            return torch.ones_like(outputs)
        if self.final_reduction == "sum":
            return torch.ones_like(outputs)
        return torch.full_like(outputs, float(self._own_terms(self.progress.batch).sum()))

    def _own_terms(self, batch: Any) -> Tensor:
        """Count the terms as the user does, or one for each example."""
        if self.loss.terms is None:
            return torch.ones(1, dtype=torch.float64)
        return torch.as_tensor(self.loss.terms(batch)).double()

    def _check_reduction(
        self, forward: Callable[[Any], Any], inputs: Any, value: float, count: int
    ) -> None:
        """Measure whether the loss of a batch is the mean or the sum of those of the examples."""
        values = torch.tensor(self.progress.values, dtype=torch.float64)
        examples = (_example(inputs, number, count) for number in range(count))
        terms = torch.stack([self._own_terms(example).sum().cpu() for example in examples])
        if count == 1 and self.progress.reduction is None:
            # One example cannot tell; were it there twice, a sum would double.
            with torch.no_grad():
                value = float(forward(mapped(_twice, inputs)))
            values, terms = values.repeat(2), terms.repeat(2)
        expected = {
            "mean": float((values * terms).sum() / terms.sum()) if terms.any() else value,
            "sum": float(values.sum()),
        }
        tolerance = 4 * self.progress.precision**0.5 * max(abs(value), *map(abs, values.tolist()))
        fits = [name for name, found in expected.items() if abs(found - value) <= tolerance]
        known = self.progress.reduction
        if not fits or known not in (None, *fits):
            raise ValueError(
                f"{self.name} is {value:g} for a batch of {count}, and for its examples one by one "
                f"it has the mean {expected['mean']:g} and the sum {expected['sum']:g}; expected "
                f"one of them{f' ({known}, as in earlier batches)' if known else ''}: return a loss"
                f" for each example, or pass ModelLoss(loss, terms=...) with a function that counts"
                f" the terms of each example of a batch, such as its tokens that have labels"
            )
        if len(fits) == 1:
            self.progress.reduction = fits[0]


def _count(batch: Any, num_examples: Callable[[Any], int] | None) -> int:
    """Return the number of examples of a batch, to cut it."""
    if num_examples is not None:
        return num_examples(batch)
    sizes = {len(tensor) for tensor in tensors_of(batch) if tensor.ndim}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(
            f"a batch's tensors have first axes of {sorted(sizes)}, so that its number of examples "
            f"is not obvious; pass batch_size_fn, a function from a batch to its number of examples"
        )
    (count,) = sizes
    return count


def _example(batch: Any, number: int, count: int) -> Any:
    """Return a batch of one example; values without a row for each example stay unchanged."""

    def cut(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) % count == 0 and len(leaf):
            rows = len(leaf) // count
            return leaf[number * rows : (number + 1) * rows]
        return leaf

    return mapped(cut, batch)


def _twice(leaf: Any) -> Any:
    return torch.cat([leaf, leaf]) if isinstance(leaf, Tensor) and leaf.ndim else leaf
