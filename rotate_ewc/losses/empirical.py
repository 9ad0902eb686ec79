"""Any differentiable loss, of which nothing is known but its gradients: the empirical matrix."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import torch
from torch import Generator, Tensor, nn
from torch.func import grad, vmap

from rotate_ewc._utils.structure import Packing, mapped, tensors_of
from rotate_ewc.losses.base import BatchForm
from rotate_ewc.losses.gradients_only import GradientsOnly, UserLoss
from rotate_ewc.losses.structured import Structured
from rotate_ewc.options import FisherType


class EmpiricalLoss(UserLoss):
    """A custom loss of outputs and targets, for `fisher_type="empirical"`.

    It adds what the package cannot measure. A plain function is enough if it returns a number for
    each term, their mean over examples that all count the same, or their sum.

    Examples:
        The mean over the words of all sentences, which differ in length:

        >>> import torch
        >>> from rotate_ewc import EmpiricalLoss
        >>> def loss(outputs, targets):
        ...     return (outputs - targets).abs().sum() / (targets > 0).sum()
        >>> loss = EmpiricalLoss(loss, terms=lambda outputs, targets: (targets > 0).sum(dim=1))
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        *,
        terms: Callable[..., Tensor] | None = None,
        reduction: str | None = None,
    ) -> None:
        """Take a function.

        Args:
            function: From outputs and targets, or from outputs alone (then a batch of data is
                inputs alone), to the loss: one number, or one or more for each example.
            terms: From the same arguments to what the mean divides by: one number or more for each
                example, with the examples first. None counts the rows of the outputs for a loss
                that is one number, and otherwise the numbers of the loss.
            reduction: How several numbers for a batch are reduced: `"mean"` (the same as None) or
                `"sum"`. For a single number the reduction is measured; a given reduction must agree
                with it.

        Raises:
            TypeError: If `function` or `terms` cannot be called.
            ValueError: If the reduction is another.
        """
        super().__init__(function, terms=terms, reduction=reduction)

    def __call__(self, *arguments: Any) -> Tensor:
        """Return the loss, for training."""
        return self.function(*arguments)


@dataclass
class Measured:
    """What the batches so far have shown of a loss.

    Attributes:
        reduction: `"mean"` or `"sum"`; None before it was decided.
        several: Whether the loss has several numbers for a batch; None before the first.
        shape: Shape of a row of the outputs in the first batch.
    """

    reduction: str | None = None
    several: bool | None = None
    shape: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Empirical(GradientsOnly, Structured):
    """Gradients of each example's loss at the outputs, by autograd.

    The loss of every example is computed by itself, and its gradient compared with that of the
    batch: so a loss that mixes examples is found out, and whether it is their mean or their sum.

    Attributes:
        loss: The loss with its options.
        measured: What the batches so far have shown.
    """

    loss: EmpiricalLoss = field(default_factory=lambda: EmpiricalLoss(torch.sum))
    measured: Measured = field(default_factory=Measured)

    @classmethod
    def of(cls, loss: Callable[..., Any], name: str) -> Empirical:
        """Take a loss of which nothing is known.

        Raises:
            TypeError: If it is a function of a model and a batch.
        """
        loss = loss if isinstance(loss, EmpiricalLoss) else EmpiricalLoss(loss)
        if first_argument(loss.function) == "model":
            raise TypeError(
                f"loss_func is {name}, a function of a model; expected a function of outputs and "
                f"targets, or ModelLoss(loss_func) for a function of a model and a batch"
            )
        measured = Measured(reduction=loss.reduction)
        return cls(name, "mean", loss=loss, measured=measured)

    @property
    def batch_form(self) -> BatchForm:
        """Inputs alone for a function of outputs alone."""
        return BatchForm.PAIR if self._takes_targets else BatchForm.INPUTS

    @property
    def final_reduction(self) -> str:
        """The reduction that was measured."""
        return self.measured.reduction or "mean"

    @property
    def observed(self) -> dict[str, Any]:
        """The reduction and the evidence for it, where they are known."""
        found: dict[str, Any] = {}
        if self.measured.reduction is not None:
            found["reduction"] = self.measured.reduction
        if self.measured.several is not None:
            found["several numbers"] = self.measured.several
            if self._is_plain_mean(self.measured.several):
                found["outputs of an example of shape"] = self.measured.shape
        return found

    def take_over(self, observed: Mapping[str, Any]) -> None:
        """Take over the reduction."""
        self.measured.reduction = observed.get("reduction")

    def completed_targets(self, outputs: Tensor, targets: Any, fisher_type: FisherType) -> Any:
        """Leave targets as they are: None may be what the loss expects."""
        del outputs, fisher_type
        return targets

    def num_terms(self, outputs: Tensor, targets: Any) -> Tensor:
        """Count the terms as the user does; or the loss's numbers, or the rows of the outputs."""
        own = self._own_terms(outputs, targets)
        if own is not None:
            return own.sum()
        with torch.no_grad():
            value = self._call(self.packing, outputs, targets)
        count = value.numel() if value.ndim else len(outputs)
        return torch.tensor(float(count), dtype=torch.float64)

    def vectors(
        self,
        outputs: Tensor,
        targets: Any,
        num_examples: int,
        fisher_type: FisherType,
        mc_samples: int,
        generator: Generator,
    ) -> Iterator[Tensor]:
        """Yield the gradient of the summed loss, from the losses of single examples.

        Raises:
            ValueError: If the loss of the batch is neither their mean nor their sum.
            TypeError: If the loss is no floating-point tensor.
        """
        del mc_samples, generator
        if fisher_type is not FisherType.EMPIRICAL:
            self.refuse()
        value, whole = self._of_batch(outputs, targets)
        self._check_form(value, outputs, num_examples)
        alone = self._of_examples(outputs, targets, num_examples)
        rows = outputs.shape[0] // num_examples
        if value.ndim:
            if not _close(whole, alone):
                raise ValueError(self._mixing("the sum of its numbers"))
            yield alone
            return
        terms = outputs.new_full((num_examples,), rows)
        own = self._own_terms(outputs, targets)
        if own is not None:
            terms = own.to(outputs).reshape(num_examples, -1).sum(1)
        weights = terms.repeat_interleave(rows).view(-1, *[1] * (outputs.ndim - 1))
        # The mean over no terms is not a number.
        alone = torch.where(weights > 0, alone, 0.0)
        found = self._reduction(outputs, targets, whole, alone, weights / terms.sum())
        yield alone * weights if found == "mean" else alone

    def gradient(self, outputs: Tensor, targets: Any) -> Tensor:
        """Return the gradient of the batch's loss."""
        return self._of_batch(outputs, targets)[1]

    @property
    def _takes_targets(self) -> bool:
        return num_arguments(self.loss.function) != 1

    def _call(self, packing: Packing | None, outputs: Tensor, targets: Any) -> Tensor:
        """Call the function with the outputs as the model gave them."""
        given = outputs if packing is None else packing.unpacked(outputs)
        arguments = (given, targets) if self._takes_targets else (given,)
        value = self.loss.function(*arguments)
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"loss_func {self.name} returned {kind}; expected a float tensor")
        return value

    def _own_terms(self, outputs: Tensor, targets: Any) -> Tensor | None:
        """Count the terms as the user does; None if that is left to the package."""
        if self.loss.terms is None:
            return None
        given = self.unpacked(outputs)
        found = self.loss.terms(*((given, targets) if self._takes_targets else (given,)))
        if not isinstance(found, Tensor) or not found.ndim:
            raise TypeError(
                f"terms of loss_func {self.name} returned {type(found).__name__}; expected a tensor"
                f" with a number (or more) for each example"
            )
        return found.double()

    def _of_batch(self, outputs: Tensor, targets: Any) -> tuple[Tensor, Tensor]:
        """Return the loss of a batch, and the gradient of the sum of its numbers."""
        value, found = self._differentiated(outputs, targets)
        if found is None:
            raise ValueError(
                f"loss_func {self.name} does not depend on the outputs, according to autograd; "
                f"expected a differentiable function of them. For a loss that a model returns "
                f"itself, pass ModelLoss(lambda model, batch: model(**batch).loss)"
            )
        return value, found

    def _differentiated(self, outputs: Tensor, targets: Any) -> tuple[Tensor, Tensor | None]:
        """Return the loss, and the gradient of the sum of its numbers, if it has any."""
        with torch.enable_grad():
            given = outputs.detach().clone().requires_grad_()
            value = self._call(self.packing, given, targets)
            if not value.requires_grad:
                return value, None
            (found,) = torch.autograd.grad(value.sum(), given, allow_unused=True)
        return value.detach(), found

    def _of_examples(self, outputs: Tensor, targets: Any, num_examples: int) -> Tensor:
        """Return the gradients of the losses of single examples, of the outputs' shape."""
        rows = outputs.view(num_examples, -1, *outputs.shape[1:])
        leaves = list(tensors_of(targets))
        cut = [bool(t.ndim) and not len(t) % num_examples for t in leaves]
        parts = [
            t.reshape(num_examples, -1, *t.shape[1:]) if is_cut else t
            for t, is_cut in zip(leaves, cut, strict=True)
        ]

        def own_targets(own_leaves: Sequence[Tensor]) -> Any:
            left = iter(own_leaves)
            return mapped(lambda leaf: next(left) if isinstance(leaf, Tensor) else leaf, targets)

        def of_one(own: Tensor, *own_leaves: Tensor) -> Tensor:
            return self._call(self.packing, own, own_targets(own_leaves)).sum()

        axes = (0, *(0 if is_cut else None for is_cut in cut))
        try:
            found = vmap(grad(of_one), in_dims=axes)(rows, *parts)
        except Exception:  # what cannot be vectorised; all else is raised below
            each = []
            for n, own in enumerate(rows):
                leaves_of_n = [p[n] if c else p for p, c in zip(parts, cut, strict=True)]
                gradient = self._differentiated(own, own_targets(leaves_of_n))[1]
                each.append(torch.zeros_like(own) if gradient is None else gradient)
            found = torch.stack(each)
        gradients: Tensor = found.reshape(outputs.shape).detach()
        return gradients

    def _check_form(self, value: Tensor, outputs: Tensor, num_examples: int) -> None:
        """Check the number of losses, and that batches agree in what they mean."""
        several = value.ndim > 0
        if several and (len(value) % num_examples or not len(value)):
            raise ValueError(
                f"loss_func {self.name} returned shape {list(value.shape)} for {num_examples} "
                f"examples; expected one number, or the examples on the first axis"
            )
        if self.measured.several not in (None, several):
            raise ValueError(
                f"loss_func {self.name} returned one number for some batches and several for "
                f"others; expected the same for all"
            )
        shape = (len(outputs) // num_examples, *outputs.shape[1:])
        if self.measured.several is None:
            self.measured.several, self.measured.shape = several, shape
            return
        if self._is_plain_mean(several) and shape != self.measured.shape:
            raise ValueError(
                f"loss_func {self.name} is a mean, and the outputs of an example have other "
                f"shapes in other batches ({list(shape)}, and {list(self.measured.shape)} "
                f"before), so the weights of the batches are unknown; {_REMEDY}"
            )

    def _is_plain_mean(self, several: bool) -> bool:
        """Whether the loss is a mean of which only the outputs' shape tells over how many terms."""
        return not several and self.final_reduction == "mean" and self.loss.terms is None

    def _reduction(
        self, outputs: Tensor, targets: Any, whole: Tensor, alone: Tensor, shares: Tensor
    ) -> str:
        """Measure whether the loss of the batch is the mean or the sum of those of examples."""
        fits = {"mean": _close(whole, alone * shares), "sum": _close(whole, alone)}
        known = self.measured.reduction
        if known is None and all(fits.values()) and bool(alone.any()):
            # Only one example counts; were it there twice, a mean would halve its gradient.
            both = partial(_twice, rows=len(outputs))
            _, doubled = self._of_batch(both(outputs), mapped(both, targets))
            fits = {
                "mean": _close(2 * doubled[: len(outputs)], whole),
                "sum": _close(doubled[: len(outputs)], whole),
            }
        if not any(fits.values()) or (known is not None and not fits[known]):
            raise ValueError(self._mixing("their mean or their sum"))
        if known is None and sum(fits.values()) == 1:
            self.measured.reduction = known = "mean" if fits["mean"] else "sum"
        return known or "mean"

    def _mixing(self, expected: str) -> str:
        if self.measured.several:
            return (
                f"loss_func {self.name} has other gradients for a batch than for its examples one "
                f"by one, so that they depend on each other (as in contrastive losses), or the "
                f"loss is random; expected independent examples: let an example of the data be a "
                f"whole group of those that are compared, or protect the model by another loss"
            )
        known = self.measured.reduction
        found = f"{known!r}, as it was given or in earlier batches" if known else expected
        return (
            f"the loss of a batch by loss_func {self.name} is not made of the losses of its "
            f"examples as expected ({found}): they count differently, or depend on each other (as "
            f"in contrastive losses), or the loss is random; {_REMEDY}. If the examples depend on "
            f"each other, let an example of the data be a whole group of those that are compared"
        )


_REMEDY: Final = (
    "return a number for each term instead of their mean (reduction='none'), or pass "
    "EmpiricalLoss(loss, terms=...) with a function that counts the terms of each example"
)


def first_argument(function: Callable[..., Any]) -> str | None:
    """Return the name of a function's first argument; None if there is none, or is not known."""
    return next((parameter.name for parameter in _parameters(function)), None)


def num_arguments(function: Callable[..., Any]) -> int | None:
    """Return how many arguments a function must get; None if that cannot be known."""
    parameters = _parameters(function)
    if not parameters:
        return None
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in parameters):
        return None
    return len([p for p in parameters if p.kind in kinds and p.default is p.empty])


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """Return a function's parameters; none for those that do not tell."""
    called = function.forward if isinstance(function, nn.Module) else function
    try:
        return list(inspect.signature(called).parameters.values())
    except (TypeError, ValueError):
        return []


def _twice(value: Any, rows: int) -> Any:
    """Return a tensor with all of its rows twice, if it has as many as the batch or a multiple."""
    if isinstance(value, Tensor) and value.ndim and not len(value) % rows:
        return torch.cat([value, value])
    return value


def _close(one: Tensor, other: Tensor) -> bool:
    """Whether gradients are the same but for rounding."""
    scale = torch.maximum(one.abs().max(), other.abs().max())
    difference = (one - other).abs().max()
    return bool(difference <= 4 * torch.finfo(one.dtype).eps ** 0.5 * scale)
