"""Sums of losses, one for each of several outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn

from rotate_ewc._utils.structure import Packing, packed, packed_like, part_of
from rotate_ewc._utils.validation import as_non_negative_number
from rotate_ewc.losses.base import Likelihood
from rotate_ewc.losses.structured import Structured


class SumOfLosses(nn.Module):
    """The weighted sum of losses of several outputs, each with its own targets.

    Outputs are a dictionary, a tuple or list, or a dataclass; a loss's key is the name or the
    number of its output. Targets have the same form, or are one tensor for all losses.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from rotate_ewc import SumOfLosses
        >>> loss = SumOfLosses({"digit": nn.CrossEntropyLoss(), "angle": nn.MSELoss()},
        ...                    weights={"angle": 0.1})
        >>> outputs = {"digit": torch.zeros(4, 10), "angle": torch.ones(4, 1)}
        >>> targets = {"digit": torch.arange(4), "angle": torch.zeros(4, 1)}
        >>> round(float(loss(outputs, targets)), 4)
        2.4026
    """

    def __init__(
        self,
        losses: Mapping[Any, Callable[..., Any]],
        weights: Mapping[Any, float] | None = None,
    ) -> None:
        """Take a loss for every output.

        Args:
            losses: The losses, by the names or numbers of their outputs.
            weights: Factors of the losses, by the same keys; 1 for keys that are missing.

        Raises:
            ValueError: If there are no losses, or a weight is negative, not finite or without a
                loss.
            TypeError: If an argument is not a mapping, or a loss cannot be called.
        """
        super().__init__()
        for name, value in (("losses", losses), ("weights", weights or {})):
            if not isinstance(value, Mapping):
                raise TypeError(f"{name} is {type(value).__name__}; expected a dictionary by key")
        given = dict(weights or {})
        if not losses or given.keys() - losses.keys():
            raise ValueError(
                f"losses has the keys {list(losses)}, and weights {list(given)}; expected at least "
                f"one loss, and weights of losses only"
            )
        for key, loss in losses.items():
            if not callable(loss):
                raise TypeError(f"losses[{key!r}] is {loss!r}; expected a loss")
        self.losses = dict(losses)
        self.weights = {
            key: as_non_negative_number(f"weights[{key!r}]", given.get(key, 1.0)) for key in losses
        }
        # So that they are moved and shown with this one.
        self._modules.update(
            {str(key): loss for key, loss in losses.items() if isinstance(loss, nn.Module)}
        )

    def forward(self, outputs: Any, targets: Any) -> Tensor:
        """Return the sum."""
        terms = [
            self.weights[key] * loss(part_of(outputs, key), target_of(targets, key))
            for key, loss in self.losses.items()
        ]
        return torch.stack(terms).sum()


class Head(NamedTuple):
    """One of the losses: its output's key, its weight and its likelihood."""

    key: Any
    weight: float
    likelihood: Likelihood


class Part(NamedTuple):
    """What one head gets of a batch.

    Attributes:
        head: The head.
        factor: What its summed loss is multiplied with.
        outputs: Its outputs, as one tensor.
        targets: Its targets.
        packing: How its outputs lie in the tensor, if there are several.
    """

    head: Head
    factor: float
    outputs: Tensor
    targets: Any
    packing: Packing | None

    @property
    def likelihood(self) -> Likelihood:
        """The head's likelihood for outputs that lie so."""
        likelihood = self.head.likelihood
        if isinstance(likelihood, Structured):
            return replace(likelihood, packing=self.packing)
        return likelihood


@dataclass(frozen=True, eq=False)
class Heads(Structured):
    """`SumOfLosses`, whose Hessian has a block for each output and nothing between them.

    The summed loss is `Σ_h c_h L_h`. With the reduction `sum` c_h is the weight w_h. With `mean`
    the loss is `Σ_h w_h L_h / M_h`, each L_h over its own number of terms M_h; over the mean number
    `M = Σ w_h M_h / Σ w_h` it is `Σ_h c_h L_h / M` with `c_h = w_h M / M_h`. Hence the numbers must
    be known beforehand, for all data.

    Attributes:
        heads: The losses.
        numbers: M_h, for all data; None where they are not needed, or not known yet.
    """

    heads: tuple[Head, ...] = ()
    numbers: tuple[float, ...] | None = None

    @classmethod
    def of(cls, loss: SumOfLosses, likelihoods: Mapping[Any, Likelihood | None]) -> Heads | None:
        """Take the likelihoods of the losses by key; None if one of them is not known.

        Raises:
            ValueError: If the losses have different reductions.
        """
        heads = tuple(
            Head(key, loss.weights[key], likelihood)
            for key, likelihood in likelihoods.items()
            if likelihood is not None
        )
        if len(heads) < len(likelihoods):
            return None
        reductions = {head.key: head.likelihood.reduction for head in heads}
        if len({*reductions.values()}) > 1:
            raise ValueError(
                f"the losses of SumOfLosses have the reductions {reductions}; expected the same "
                f"for all"
            )
        name = f"SumOfLosses({', '.join(head.likelihood.name for head in heads)})"
        return cls(name, heads[0].likelihood.reduction, heads=heads)

    def chosen(self, outputs: Any) -> Any:
        """Return the outputs that have a loss."""
        found = []
        for head in self.heads:
            part = _looked_up("outputs", outputs, head.key)
            if isinstance(head.likelihood, Structured):
                part = head.likelihood.chosen(part)
            found.append(part)
        return tuple(found)

    def check(self, outputs: Tensor, targets: Any) -> None:
        """Check the outputs and targets of every head."""
        for part in self._parts(outputs, targets):
            with _naming(part.head):
                part.likelihood.check(part.outputs, part.targets)

    def num_terms(self, outputs: Tensor, targets: Any) -> Tensor:
        """Return the weighted mean of the heads' numbers of terms."""
        weights = outputs.new_tensor([head.weight for head in self.heads])
        total = weights.sum()
        return (self._numbers(outputs, targets) * weights).sum() / torch.where(total > 0, total, 1)

    def predictions(self, outputs: Tensor) -> int:
        """All predictions of all heads."""
        return sum(part.likelihood.predictions(part.outputs) for part in self._parts(outputs))

    def exact_vectors(self, outputs: Tensor, targets: Any, num_examples: int) -> Iterator[Tensor]:
        """Yield every head's vectors times √c, with zeros for the other heads."""
        parts = self._parts(outputs, targets)
        for number, part in enumerate(parts):
            vectors = part.likelihood.exact_vectors(part.outputs, part.targets, num_examples)
            for vector in vectors:
                scaled = vector * part.factor**0.5
                yield self._joined(
                    outputs,
                    [
                        scaled if number == other else torch.zeros_like(parts[other].outputs)
                        for other in range(len(parts))
                    ],
                )

    def sampled_vector(self, outputs: Tensor, targets: Any, generator: Generator) -> Tensor:
        """Return all heads' vectors for labels that are drawn independently, times √c."""
        return self._joined(
            outputs,
            [
                part.factor**0.5
                * part.likelihood.sampled_vector(part.outputs, part.targets, generator)
                for part in self._parts(outputs, targets)
            ],
        )

    def gradient(self, outputs: Tensor, targets: Any) -> Tensor:
        """Return all heads' gradients times c."""
        return self._joined(
            outputs,
            [
                part.factor * part.likelihood.gradient(part.outputs, part.targets)
                for part in self._parts(outputs, targets)
            ],
        )

    def completed_targets(self, outputs: Tensor, targets: Any, fisher_type: Any) -> Any:
        """Return the targets, with others for those heads that have none and need none."""
        found = {}
        for part in self._parts(outputs, targets):
            with _naming(part.head):
                found[part.head.key] = part.likelihood.completed_targets(
                    part.outputs, part.targets, fisher_type
                )
        return found

    @property
    def has_counts(self) -> bool:
        """Whether the loss is a sum of means, whose numbers of terms are not known yet."""
        return self.reduction == "mean" and self.numbers is None

    def counts(self, outputs: Tensor, targets: Any) -> Tensor:
        """Return every head's number of terms, in double precision."""
        return self._numbers(outputs, targets).double()

    def with_counts(self, counts: Tensor) -> Heads:
        """Return the likelihood for data with these numbers of terms."""
        numbers = tuple(counts.tolist())
        for head, number in zip(self.heads, numbers, strict=True):
            if head.weight and number <= 0:
                raise ValueError(
                    f"no target in the data counts for the output {head.key!r} (all are ignored, "
                    f"or have weight 0), so its mean loss is undefined; expected at least one"
                )
        return replace(self, numbers=numbers)

    @property
    def can_be_softened(self) -> bool:
        """Whether one of the outputs can be."""
        return any(head.likelihood.can_be_softened for head in self.heads)

    def relative_entropies(self, outputs: Tensor, targets: Any) -> Tensor | None:
        """Return those of all heads that have any and count."""
        found = [
            part.likelihood.relative_entropies(part.outputs, part.targets)
            for part in self._parts(outputs, targets)
            if part.head.weight
        ]
        known = [entropies.flatten() for entropies in found if entropies is not None]
        return torch.cat(known) if known else None

    def softened(self, outputs: Tensor, temperature: float) -> Tensor:
        """Soften what can be softened, and divide the gradients of the others."""
        return self._joined(
            outputs,
            [
                part.likelihood.softened(part.outputs, temperature)
                if part.likelihood.can_be_softened
                else _with_gradient_divided(part.outputs, temperature)
                for part in self._parts(outputs)
            ],
        )

    def _parts(self, outputs: Tensor, targets: Any = None) -> list[Part]:
        """Return what every head gets."""
        factors = [head.weight for head in self.heads]
        if self.numbers is not None:
            mean = sum(w * m for w, m in zip(factors, self.numbers, strict=True))
            mean /= sum(factors) or 1.0
            factors = [
                w * mean / m if w else 0.0 for w, m in zip(factors, self.numbers, strict=True)
            ]
        parts = []
        for head, factor, own in zip(self.heads, factors, self.unpacked(outputs), strict=True):
            tensor, packing = packed(own)
            parts.append(Part(head, factor, tensor, target_of(targets, head.key), packing))
        return parts

    def _numbers(self, outputs: Tensor, targets: Any) -> Tensor:
        parts = self._parts(outputs, targets)
        numbers = [part.likelihood.num_terms(part.outputs, part.targets) for part in parts]
        return torch.stack([number.to(outputs) for number in numbers])

    def _joined(self, outputs: Tensor, of_heads: list[Tensor]) -> Tensor:
        """Return a tensor for each head as one, as the outputs are packed."""
        parts = self._parts(outputs)
        trees = [
            part.packing.unpacked(found) if part.packing is not None else found
            for part, found in zip(parts, of_heads, strict=True)
        ]
        return packed_like(trees, len(outputs))


def target_of(targets: Any, key: Any) -> Any:
    """Return the targets of one output: those of its key, or all."""
    if targets is None or isinstance(targets, Tensor):
        return targets
    return _looked_up("targets", targets, key)


def _looked_up(what: str, value: Any, key: Any) -> Any:
    try:
        return part_of(value, key)
    except LookupError as error:
        found = list(value) if isinstance(value, Mapping) else type(value).__name__
        raise ValueError(
            f"SumOfLosses has a loss for {key!r}, but the {what} are {found}; expected a "
            f"dictionary, tuple or dataclass with that key"
        ) from error


@contextmanager
def _naming(head: Head) -> Iterator[None]:
    """Say which output it was."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"output {head.key!r} of SumOfLosses: {error}") from error


def _with_gradient_divided(outputs: Tensor, factor: float) -> Tensor:
    """Return the same values, whose gradient is divided by a factor."""
    values = outputs.detach()
    return values + (outputs - values) / factor
