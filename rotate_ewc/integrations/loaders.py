"""What several integrations ask of a data loader."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, Subset

from rotate_ewc._utils.preserve_state import kept, random_states


def number_of_examples(loader: Any) -> int | None:
    """Return the number of examples that a loader draws from; None where that is not known."""
    dataset = getattr(loader, "dataset", None)
    if dataset is None or isinstance(dataset, IterableDataset):
        return None
    return len(dataset) if hasattr(dataset, "__len__") else None


def first_batch(loader: Any) -> Iterable[Any] | None:
    """Return a batch such as a loader yields, without a trace in its order, workers or stream.

    Args:
        loader: What is about to be trained on.

    Returns:
        Batches, of which only the first is to be read; None where none can be had without a trace.

    Raises:
        ValueError: If the loader reads a stream that can be read only once.
    """
    if isinstance(loader, (list, tuple)):
        return loader
    if not isinstance(loader, DataLoader):
        return None
    dataset, size = loader.dataset, loader.batch_size
    if isinstance(dataset, IterableDataset):
        stream: Any = iter(dataset)
        if stream is iter(dataset):
            raise ValueError(
                f"the training data are a one-shot stream ({type(dataset).__name__}), of which "
                f"nothing is left to consolidate after training; expected one whose __iter__ "
                f"begins again, or consolidate_at_end=False"
            )
        # Others may note how far they have come.
        if type(loader) is not DataLoader:
            return None
        return DataLoader(dataset, batch_size=size, collate_fn=loader.collate_fn)
    if size is not None:
        part = Subset(dataset, range(min(size, len(dataset))))  # type: ignore[arg-type]
        return DataLoader(part, batch_size=size, collate_fn=loader.collate_fn)
    try:
        sampler: Any = loader.batch_sampler or loader.sampler
        sampler = copy.deepcopy(sampler, {id(dataset): dataset})
    except Exception:  # whatever their own copying raises
        return None
    with kept(random_states([])):
        first = next(iter(sampler), None)
    if first is None:
        return None
    if loader.batch_sampler is None:
        return DataLoader(dataset, batch_size=None, sampler=[first], collate_fn=loader.collate_fn)
    return DataLoader(dataset, batch_sampler=[first], collate_fn=loader.collate_fn)
