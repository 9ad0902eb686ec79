"""Avalanche's experiences and batches, as the penalty takes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from avalanche.models import avalanche_forward
from torch import Tensor, nn
from torch.utils.data import DataLoader


class Batches:
    """Avalanche's batches (x, y) or (x, y, ..., task labels) as ((x, task labels), y)."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        """Wrap a loader."""
        self._loader = loader

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[tuple[Tensor, Tensor | None], Tensor]]:
        """Yield the batches."""
        for batch in self._loader:
            yield inputs_of(batch), batch[1]


def inputs_of(batch: Sequence[Any]) -> tuple[Tensor, Tensor | None]:
    """Return the inputs of a batch (x, y) or (x, y, ..., task labels), and its task labels."""
    return batch[0], batch[-1] if len(batch) > 2 else None


def forward_batch(model: nn.Module, inputs: tuple[Tensor, Tensor | None]) -> Tensor:
    """Return a model's outputs for a batch, with its task labels if the model takes any."""
    x, task_labels = inputs
    outputs: Tensor = avalanche_forward(model, x, task_labels)
    return outputs


def whole_task(experience: Any) -> Any:
    """Return the experience that holds the whole task; online streams cut it into parts.

    The parts of streams that fade from task to task belong to none, and stand for themselves.
    """
    return getattr(experience.logging(), "origin_experience", None) or experience
