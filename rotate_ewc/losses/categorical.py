"""Cross-entropy: class weights, ignored labels, label smoothing and soft targets."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Generator, Tensor, nn

from rotate_ewc.losses.base import Likelihood, non_negative, shape_of
from rotate_ewc.losses.draws import uniform

_DRAWN_AT_ONCE: Final = 2**18


@dataclass(frozen=True, eq=False)
class Categorical(Likelihood):
    """Softmax over classes: outputs `[N, C]` or `[N, C, ...]`, labels `[N]` or `[N, ...]`.

    Every variant of the loss is `-Σ_c q_c log p_c` with some weights q: one-hot, smoothed, given as
    probabilities, multiplied by class weights, zero where the label is ignored. With `s = Σ_c q_c`
    its gradient is `s p - q` and its Hessian `s (diag(p) - p pᵀ)`.

    Attributes:
        class_weights: `[C]`, or None for ones.
        ignore_index: Label of predictions that count nothing.
        label_smoothing: Part of a label that is spread over all classes.
    """

    class_weights: Tensor | None = None
    ignore_index: int = -100
    label_smoothing: float = 0.0

    @classmethod
    def of(cls, loss: nn.CrossEntropyLoss) -> Categorical:
        """Read the options of a `CrossEntropyLoss`."""
        weights = checked_class_weights("CrossEntropyLoss", loss.weight)
        return cls(
            "CrossEntropyLoss", loss.reduction, weights, loss.ignore_index, loss.label_smoothing
        )

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Check shapes, and the range of labels or of class probabilities."""
        if outputs.ndim < 2:
            raise ValueError(
                f"{self.name} needs outputs [batch, classes, ...]; got {shape_of(outputs)}, as for "
                f"a single example; expected batches in data, as "
                f"torch.utils.data.DataLoader(data, batch_size=100) makes them of examples"
            )
        if self.class_weights is not None and len(self.class_weights) != outputs.shape[1]:
            raise ValueError(
                f"{self.name} has {len(self.class_weights)} class weights; expected "
                f"{outputs.shape[1]}, one for each of the model's outputs"
            )
        if targets.is_floating_point():
            self._check_probabilities(outputs, targets)
        else:
            self._check_labels(outputs, targets)

    def terms(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Sum the weights of a row's labels; with class probabilities, count its predictions."""
        if targets.is_floating_point():
            per_row = outputs.numel() // (len(outputs) * outputs.shape[1])
            return torch.full_like(outputs.flatten(1)[:, 0], per_row)
        kept = (targets != self.ignore_index).to(outputs.dtype)
        if self.class_weights is not None:
            weights = self.class_weights.to(outputs)
            kept = kept * weights[torch.where(targets == self.ignore_index, 0, targets).long()]
        return kept.reshape(len(outputs), -1).sum(dim=1)

    def relative_entropies(self, outputs: Tensor, targets: Tensor) -> Tensor | None:
        """Return `-Σ_c p_c log p_c / log C` where a label has any weight."""
        if outputs.shape[1] < 2:
            return None
        # Classes that a model masks out with -inf have no part in it.
        entropies: Tensor = torch.special.entr(outputs.softmax(dim=1)).sum(dim=1)
        entropies = entropies / math.log(outputs.shape[1])
        counts = self._strengths(outputs, targets).squeeze(1) > 0
        return entropies[counts.expand_as(entropies)]

    def predictions(self, outputs: Tensor) -> int:
        """All axes but the class axis."""
        return outputs.numel() // outputs.shape[1]

    def exact_vectors(
        self, outputs: Tensor, targets: Tensor, num_examples: int
    ) -> Iterator[Tensor]:
        """Yield √s times the columns of a root of diag(p) - ppᵀ at every position.

        The matrix has rank C - 1, and a triangular root with so many columns (Tanabe and Sagae
        1992, "An exact Cholesky decomposition and the generalized inverse of the
        variance-covariance matrix of the multinomial distribution"): with `q_c = Σ_{i > c} p_i`,
        column c is `√(p_c q_c / (p_c + q_c)) (e_c - Σ_{i > c} (p_i / q_c) e_i)`.
        """
        probabilities = outputs.softmax(dim=1)
        roots = self._strengths(outputs, targets).sqrt()
        rows = outputs.shape[0] // num_examples
        axes = (range(rows), *map(range, outputs.shape[2:]))
        for row, *position in itertools.product(*axes):
            at_position: tuple[Any, ...] = (slice(row, None, rows), slice(None), *position)
            p = probabilities[at_position]
            # Summed from behind, so that a small rest of probability is not lost in a large one.
            tails = p.flip(1).cumsum(dim=1).flip(1)
            for c in range(p.shape[1] - 1):
                tail = tails[:, c + 1 :][:, :1]
                # The quotient first, since the product of two small ones may be too small.
                size = (p[:, c : c + 1] * (tail / tails[:, c : c + 1])).sqrt().nan_to_num(0.0)
                size = size * roots[at_position]
                column = torch.zeros_like(p)
                column[:, c : c + 1] = size
                column[:, c + 1 :] = -size * (p[:, c + 1 :] / tail).nan_to_num(0.0)
                vector = torch.zeros_like(outputs)
                vector[at_position] = column
                yield vector

    def sampled_vector(self, outputs: Tensor, targets: Tensor, generator: Generator) -> Tensor:
        """Return `√s (p - e_y)` with labels y drawn from p."""
        probabilities = outputs.softmax(dim=1)
        numbers = uniform((len(outputs), *outputs.shape[2:]), outputs, generator)
        # In parts, since drawing takes a copy of the probabilities.
        size = max(1, _DRAWN_AT_ONCE // max(1, outputs[0].numel()))
        parts = zip(torch.split(probabilities, size), torch.split(numbers, size), strict=True)
        labels = torch.cat([_drawn(part, number) for part, number in parts])
        roots = self._strengths(outputs, targets).sqrt()
        return _minus_one_hot_(probabilities, labels.unsqueeze(1)).mul_(roots)

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return `s p - q`."""
        probabilities = outputs.softmax(dim=1)
        if self._plain(targets):
            # No second tensor of the outputs' size, which a large vocabulary makes large.
            kept = (targets != self.ignore_index).unsqueeze(1)
            labels = targets.unsqueeze(1).long().where(kept, 0)
            return _minus_one_hot_(probabilities, labels).mul_(kept)
        scaled = probabilities.mul_(self._strengths(outputs, targets))
        return scaled.sub_(self._target_weights(outputs, targets))

    def stand_in_targets(self, outputs: Tensor) -> Tensor | None:
        """Return labels that count, without class weights, which depend on the labels given."""
        if self.class_weights is not None:
            return None
        label = 1 if self.ignore_index == 0 else 0
        shape = (outputs.shape[0], *outputs.shape[2:])
        return torch.full(shape, label, dtype=torch.long, device=outputs.device)

    def _plain(self, targets: Tensor) -> bool:
        """Whether q is one-hot, or zero where the label is ignored."""
        options = self.class_weights is not None or bool(self.label_smoothing)
        return not options and not targets.is_floating_point()

    def _strengths(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return s, `[N, 1, ...]`."""
        if self._plain(targets):
            return (targets != self.ignore_index).to(outputs.dtype).unsqueeze(1)
        return self._target_weights(outputs, targets).sum(dim=1, keepdim=True)

    def _target_weights(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return q, of the outputs' shape."""
        kept = None
        if targets.is_floating_point():
            weights = targets.to(outputs.dtype)
        else:
            ignored = targets == self.ignore_index
            weights = _one_hot(torch.where(ignored, 0, targets), outputs)
            kept = ~ignored.unsqueeze(1)
        if self.label_smoothing:
            smoothing = self.label_smoothing
            weights = (1 - smoothing) * weights + smoothing / outputs.shape[1]
        if self.class_weights is not None:
            along_classes = (-1, *(1 for _ in outputs.shape[2:]))
            weights = weights * self.class_weights.to(outputs).view(along_classes)
        return weights if kept is None else weights * kept

    def _check_labels(self, outputs: Tensor, targets: Tensor) -> None:
        expected = (outputs.shape[0], *outputs.shape[2:])
        if targets.is_complex() or targets.dtype == torch.bool:
            raise TypeError(
                f"{self.name} targets have dtype {targets.dtype}; expected class indices "
                f"(torch.long) or class probabilities (floating-point)"
            )
        if targets.shape != expected:
            advice = ""
            if outputs.ndim > 2 and targets.shape == outputs.shape[:-1]:
                advice = (
                    "; where they are the last axis, have forward move it: "
                    "forward=lambda x: model(x).movedim(-1, 1) (for an operator, as model_func)"
                )
            raise ValueError(
                f"{self.name} outputs {shape_of(outputs)} and targets {shape_of(targets)} do not "
                f"fit; expected targets {list(expected)} (the classes are the outputs' second "
                f"axis{advice})"
            )
        labels = targets[targets != self.ignore_index]
        if labels.numel() == 0:
            return
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= outputs.shape[1]:
            raise ValueError(
                f"{self.name} targets run from {low} to {high}; expected class indices from 0 to "
                f"{outputs.shape[1] - 1}, since the model has {outputs.shape[1]} outputs"
            )

    def _check_probabilities(self, outputs: Tensor, targets: Tensor) -> None:
        if targets.shape != outputs.shape:
            raise ValueError(
                f"{self.name} outputs {shape_of(outputs)} and targets {shape_of(targets)} (class "
                f"probabilities) do not fit; expected the same shape, or integer class indices"
            )
        if not bool((torch.isfinite(targets) & (targets >= 0)).all()):
            raise ValueError(
                f"{self.name} targets are floating-point, but not class probabilities; expected "
                f"finite numbers of at least 0, or integer class indices"
            )


def checked_class_weights(loss: str, weights: Tensor | None) -> Tensor | None:
    """Return class weights; raise `ValueError` if one of them is negative or not finite."""
    return non_negative(loss, "class weights", weights)


def _drawn(probabilities: Tensor, numbers: Tensor) -> Tensor:
    """Draw labels `[N, ...]` from probabilities `[N, C, ...]`, with a number from 0 to 1 for each.

    Label c is drawn where the number is between the sums of the first c and c + 1 probabilities.
    """
    sums = probabilities.movedim(1, -1).contiguous().cumsum(dim=-1)
    # A little less, so that rounding draws no label that has no probability.
    total = sums[..., -1:] * (1.0 - torch.finfo(sums.dtype).eps)
    return torch.searchsorted(sums, numbers.unsqueeze(-1) * total, right=True).squeeze(-1)


def _one_hot(labels: Tensor, outputs: Tensor) -> Tensor:
    """Return labels `[N, ...]` as one-hot vectors `[N, C, ...]` in the outputs' dtype."""
    return torch.zeros_like(outputs).scatter_(1, labels.long().unsqueeze(1), 1.0)


def _minus_one_hot_(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Return `p - e_y`, in place, with all digits also where p is next to one for the label.

    Args:
        probabilities: p, `[N, C, ...]`.
        labels: y, `[N, 1, ...]`.
    """
    others = probabilities.scatter_(1, labels, 0.0).sum(dim=1, keepdim=True)
    return probabilities.scatter_(1, labels, -others)
