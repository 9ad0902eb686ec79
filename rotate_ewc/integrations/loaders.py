"""What several integrations ask of a data loader."""

from __future__ import annotations

from typing import Any

from torch.utils.data import IterableDataset


def number_of_examples(loader: Any) -> int | None:
    """Return the number of examples that a loader draws from; None where that is not known."""
    dataset = getattr(loader, "dataset", None)
    if dataset is None or isinstance(dataset, IterableDataset):
        return None
    return len(dataset) if hasattr(dataset, "__len__") else None
