"""What several integrations ask of a data loader."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, Final

import torch
from torch.utils.data import DataLoader, IterableDataset, Subset

from rotate_ewc._utils.preserve_state import generators_of, kept, random_states

_SEED: Final = 0


def number_of_examples(loader: Any) -> int | None:
    """Return the number of examples that a loader draws from; None where that is not known."""
    dataset = getattr(loader, "dataset", None)
    if dataset is None or isinstance(dataset, IterableDataset):
        return None
    return len(dataset) if hasattr(dataset, "__len__") else None


class FirstOfStream(IterableDataset[Any]):
    """The first examples of a stream."""

    def __init__(self, stream: Iterable[Any], count: int, part: slice = slice(None)) -> None:
        """Take them in every pass.

        Args:
            stream: The stream.
            count: How many to take.
            part: Which of these, where each of several processes has a part.
        """
        self._stream = stream
        self._indices = range(count)[part]

    def __iter__(self) -> Iterator[Any]:
        """Yield the examples."""
        start, stop, step = self._indices.start, self._indices.stop, self._indices.step
        return islice(iter(self._stream), start, stop, step)


def check_stream(stream: Iterable[Any]) -> None:
    """Raise if a stream can be read only once.

    Raises:
        ValueError: If each of its iterators is the same.
    """
    if iter(stream) is iter(stream):
        raise ValueError(
            f"the training data are a one-shot stream ({type(stream).__name__}), of which nothing "
            f"is left to consolidate after training; expected one whose __iter__ begins again, or "
            f"consolidate_at_end=False"
        )


def begin_pass(data: Iterable[Any], device: torch.device | None = None) -> None:
    """Seed what loaders, collators and transforms draw from, so that every pass draws the same.

    The caller must restore the states of random numbers, and of the data's own generators.

    Args:
        data: What is about to be gone through.
        device: An accelerator on which the data draw too; None where only models do, for dropout.
    """
    random.seed(_SEED)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(_SEED)
    for generator in (torch.default_generator, *generators_of(data)):
        generator.manual_seed(_SEED)
    if device is not None and device.type not in ("cpu", "meta"):
        state = torch.Generator(device).manual_seed(_SEED).get_state()
        getattr(torch, device.type).set_rng_state(state, device)


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
        check_stream(dataset)
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
