"""The losses that the library is checked on, kept as data."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

Shape = tuple[int, ...]
Targets = Literal["labels", "ignored", "probabilities", "masses", "real", "binary", "fractions"]


@dataclass(frozen=True)
class LossSpec:
    """A loss with its options, and the targets it takes.

    Attributes:
        kind: Class of the loss.
        targets: Class indices (``labels``, of which some are ``ignored``), class probabilities (or
            ``masses`` that do not sum to 1), ``real`` or ``binary`` numbers, or ``fractions``.
        options: From the shape of one output row, classes first, to the loss's options.
        ignore_index: The label that is ignored.
    """

    kind: type[nn.Module]
    targets: Targets
    options: Callable[[Shape], dict[str, Any]] = lambda shape: {}
    ignore_index: int = -100

    def make(self, reduction: str, output_shape: Shape) -> nn.Module:
        """Return the loss module for outputs ``[N, *output_shape]``."""
        return self.kind(reduction=reduction, **self.options(output_shape)).double()


def class_weights(shape: Shape) -> Tensor:
    """Return a weight for each class, none of them 1."""
    return torch.linspace(0.3, 2.1, shape[0], dtype=torch.float64)


def without_a_class(shape: Shape) -> Tensor:
    """Return class weights of which one is 0."""
    weights = class_weights(shape)
    weights[0] = 0
    return weights


def element_weights(shape: Shape) -> Tensor:
    """Return a weight for every element of an output, of which one is 0."""
    weights = torch.linspace(0, 1.7, torch.Size(shape).numel(), dtype=torch.float64)
    return weights.reshape(shape)


def last_axis_weights(shape: Shape) -> Tensor:
    """Return weights along the last axis of an output."""
    return torch.linspace(0.4, 1.9, shape[-1], dtype=torch.float64)


def first_axis_weights(shape: Shape) -> Tensor:
    """Return weights along the first axis of an output, to be broadcast along the others."""
    weights = torch.linspace(2.5, 0.5, shape[0], dtype=torch.float64)
    return weights.reshape(-1, *(1 for _ in shape[1:]))


CE, BCE = nn.CrossEntropyLoss, nn.BCEWithLogitsLoss

PLAIN_LOSSES: dict[str, LossSpec] = {
    "ce": LossSpec(CE, "labels"),
    "mse": LossSpec(nn.MSELoss, "real"),
    "bce": LossSpec(BCE, "binary"),
}

LABEL_LOSSES: dict[str, LossSpec] = {
    "ce-weight": LossSpec(CE, "labels", lambda s: {"weight": class_weights(s)}),
    "ce-weight-zero": LossSpec(CE, "labels", lambda s: {"weight": without_a_class(s)}),
    "ce-ignore": LossSpec(CE, "ignored"),
    "ce-ignore-class": LossSpec(CE, "ignored", lambda s: {"ignore_index": 1}, ignore_index=1),
    "ce-ignore-beyond": LossSpec(CE, "ignored", lambda s: {"ignore_index": 255}, ignore_index=255),
    "ce-smooth": LossSpec(CE, "labels", lambda s: {"label_smoothing": 0.2}),
    "ce-weight-smooth": LossSpec(
        CE, "labels", lambda s: {"weight": class_weights(s), "label_smoothing": 0.3}
    ),
    "ce-weight-ignore": LossSpec(CE, "ignored", lambda s: {"weight": class_weights(s)}),
    "ce-smooth-ignore": LossSpec(CE, "ignored", lambda s: {"label_smoothing": 0.1}),
    "ce-weight-smooth-ignore": LossSpec(
        CE,
        "ignored",
        lambda s: {"weight": class_weights(s), "label_smoothing": 0.25, "ignore_index": -1},
        ignore_index=-1,
    ),
    "ce-smooth-fully": LossSpec(CE, "labels", lambda s: {"label_smoothing": 1.0}),
}

PROBABILITY_LOSSES: dict[str, LossSpec] = {
    "ce-soft": LossSpec(CE, "probabilities"),
    "ce-soft-weight": LossSpec(CE, "probabilities", lambda s: {"weight": class_weights(s)}),
    "ce-soft-smooth": LossSpec(CE, "probabilities", lambda s: {"label_smoothing": 0.2}),
    "ce-soft-weight-smooth": LossSpec(
        CE, "probabilities", lambda s: {"weight": class_weights(s), "label_smoothing": 0.2}
    ),
    "ce-soft-masses": LossSpec(CE, "masses"),
}

ELEMENT_LOSSES: dict[str, LossSpec] = {
    "bce-weight": LossSpec(BCE, "binary", lambda s: {"weight": element_weights(s)}),
    "bce-weight-last-axis": LossSpec(BCE, "binary", lambda s: {"weight": last_axis_weights(s)}),
    "bce-pos-weight": LossSpec(BCE, "binary", lambda s: {"pos_weight": first_axis_weights(s)}),
    "bce-both-weights": LossSpec(
        BCE,
        "binary",
        lambda s: {"weight": element_weights(s), "pos_weight": first_axis_weights(s)},
    ),
    "bce-fractions": LossSpec(BCE, "fractions"),
    "bce-fractions-both-weights": LossSpec(
        BCE,
        "fractions",
        lambda s: {"weight": last_axis_weights(s), "pos_weight": first_axis_weights(s)},
    ),
}

LOSSES: dict[str, LossSpec] = PLAIN_LOSSES | LABEL_LOSSES | PROBABILITY_LOSSES | ELEMENT_LOSSES


def make_targets(spec: LossSpec, examples: int, rows: int, output_shape: Shape) -> Tensor:
    """Make targets for outputs ``[examples * rows, *output_shape]``, always the same.

    Where labels are ignored, all those of the first and the fourth example are, which leaves the
    default batches with an example and with a whole batch that count nothing.

    Args:
        spec: The loss.
        examples: Number of examples.
        rows: Rows of outputs for each example.
        output_shape: Shape of one row, classes first.

    Returns:
        The targets.
    """
    generator = torch.Generator().manual_seed(3)
    shape = (examples * rows, *output_shape)
    if spec.targets in ("labels", "ignored"):
        classes, *positions = output_shape
        labels = torch.randint(classes, (examples * rows, *positions), generator=generator)
        if spec.targets == "ignored":
            by_example = labels.view(examples, -1)
            by_example[[0, 3 % examples]] = spec.ignore_index
            by_example[:, 1:][torch.rand(by_example[:, 1:].shape, generator=generator) < 0.3] = (
                spec.ignore_index
            )
        return labels
    if spec.targets == "real":
        return torch.randn(shape, generator=generator, dtype=torch.float64)
    if spec.targets == "binary":
        return torch.randint(2, shape, generator=generator).double()
    fractions = torch.rand(shape, generator=generator, dtype=torch.float64)
    if spec.targets == "probabilities":
        return fractions / fractions.sum(dim=1, keepdim=True)
    return fractions
