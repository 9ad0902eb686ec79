"""The losses that models of transformers have, as a loss of outputs and targets each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor, nn

IGNORED: Final = -100


@dataclass(frozen=True)
class LossForm:
    """How a model's loss comes out of what it returns and of the labels in a batch.

    Attributes:
        name: What messages call it.
        loss: The loss of outputs and targets.
        outputs: From what the model returns to outputs.
        targets: From a batch to targets.
        labels: The keys of the batch in which the labels are.
    """

    name: str
    loss: nn.Module
    outputs: Callable[[Any], Tensor]
    targets: Callable[[Mapping[str, Any]], Tensor]
    labels: tuple[str, ...] = ("labels",)

    def value(self, outputs: Tensor, targets: Tensor) -> float:
        """Return the loss of a batch, as the model itself computes it; raise if it cannot be."""
        if not isinstance(self.loss, nn.CrossEntropyLoss) and outputs.shape != targets.shape:
            raise ValueError(f"outputs {list(outputs.shape)}, labels {list(targets.shape)}")
        if self is not SPANS:
            return float(self.loss(outputs, targets))
        ends = zip(outputs.unbind(-1), targets.unbind(-1), strict=True)
        return float(torch.stack([self.loss(o, t) for o, t in ends]).mean())

    def smoothed(self, label_smoothing: float) -> LossForm:
        """Return the form with smoothed labels, as `Trainer` can have them.

        Raises:
            ValueError: If the loss is no cross-entropy.
        """
        if not label_smoothing:
            return self
        if not isinstance(self.loss, nn.CrossEntropyLoss) or self is SPANS:
            raise ValueError(
                f"label_smoothing is {label_smoothing:g}, but the model's loss is one of "
                f"{self.name}; expected 0"
            )
        return replace(self, loss=nn.CrossEntropyLoss(label_smoothing=label_smoothing))

    def num_terms(self, targets: Tensor) -> int:
        """Return what targets add to the number that the mean divides by."""
        if isinstance(self.loss, nn.CrossEntropyLoss):
            return int((targets != IGNORED).sum())
        return targets.numel()


def _next_tokens(output: Any) -> Tensor:
    logits: Tensor = output.logits
    return logits[:, :-1].transpose(1, 2)


def _tokens(output: Any) -> Tensor:
    logits: Tensor = output.logits
    return logits.transpose(1, 2)


def _logits(output: Any) -> Tensor:
    logits: Tensor = output.logits
    return logits


def _numbers(output: Any) -> Tensor:
    logits: Tensor = output.logits
    return logits.unsqueeze(1) if logits.ndim == 1 else logits


def _ends(output: Any) -> Tensor:
    return torch.stack([output.start_logits, output.end_logits], dim=-1)


def _labels(batch: Mapping[str, Any]) -> Tensor:
    labels: Tensor = batch["labels"]
    return labels


def _next_labels(batch: Mapping[str, Any]) -> Tensor:
    return _labels(batch)[:, 1:]


def _one_label(batch: Mapping[str, Any]) -> Tensor:
    return _labels(batch).flatten()


def _float_labels(batch: Mapping[str, Any]) -> Tensor:
    labels = _labels(batch)
    labels = labels if labels.is_floating_point() else labels.float()
    return labels.unsqueeze(1) if labels.ndim == 1 else labels


def _positions(batch: Mapping[str, Any]) -> Tensor:
    """Return the first and the last token, `[N, 2]`; those behind the end do not count."""
    tokens = batch["input_ids"] if "input_ids" in batch else batch["inputs_embeds"]
    ends = [batch[key].flatten() for key in SPANS.labels]
    positions = torch.stack(ends, dim=1).clamp(min=0)
    return positions.masked_fill(positions >= tokens.shape[1], IGNORED)


_CROSS_ENTROPY: Final = nn.CrossEntropyLoss()

NEXT_TOKENS: Final = LossForm("next tokens", _CROSS_ENTROPY, _next_tokens, _next_labels)
TOKENS: Final = LossForm("tokens", _CROSS_ENTROPY, _tokens, _labels)
ONE_CLASS: Final = LossForm("one class", _CROSS_ENTROPY, _logits, _one_label)
SEVERAL_CLASSES: Final = LossForm("several classes", nn.BCEWithLogitsLoss(), _logits, _float_labels)
REGRESSION: Final = LossForm("regression", nn.MSELoss(), _numbers, _float_labels)
SPANS: Final = LossForm(
    "the first and the last token of an answer",
    _CROSS_ENTROPY,
    _ends,
    _positions,
    ("start_positions", "end_positions"),
)
