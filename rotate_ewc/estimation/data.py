"""Iterate over the user's data: what a batch must be, and on which device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from rotate_ewc._utils.tree import tensors_in, to_device
from rotate_ewc.errors import NotFiniteError


def check_reiterable(data: object) -> None:
    """Raise unless `data` can be iterated more than once.

    Raises:
        TypeError: If `data` is not iterable at all.
        ValueError: If `data` is its own iterator, such as a generator: it would be used up.
    """
    try:
        iterator = iter(data)  # type: ignore[call-overload]
    except TypeError:
        raise TypeError(
            f"data is {type(data).__name__}; expected an iterable of batches (inputs, targets)"
        ) from None
    if iterator is data:
        raise ValueError(
            f"data is a one-shot iterator ({type(data).__name__}), of which any look would lose "
            f"batches; pass something that can be iterated again, such as a list or a DataLoader"
        )


def batches(
    data: Iterable[Any], device: torch.device, *, progressbar: bool, description: str
) -> Iterator[tuple[int, Any, Tensor]]:
    """Yield (index, inputs, targets) of every batch, moved to a device.

    Raises:
        ValueError: If a batch is not a pair, or if there are no batches.
        TypeError: If a batch's targets are not a tensor.
    """
    index = -1
    for index, batch in enumerate(tqdm(data, desc=description, disable=not progressbar)):
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            got = (
                f"{type(batch).__name__} of {len(batch)} items"
                if isinstance(batch, (tuple, list))
                else type(batch).__name__
            )
            raise ValueError(f"batch {index} of data is a {got}; expected (inputs, targets)")
        inputs, targets = batch
        if not isinstance(targets, Tensor):
            raise TypeError(
                f"batch {index} of data has targets of type {type(targets).__name__}; "
                f"expected a tensor"
            )
        yield index, to_device(inputs, device), targets.to(device)
    if index < 0:
        raise ValueError("data is empty; expected at least one batch (inputs, targets)")


@contextmanager
def naming_batch(index: int) -> Iterator[None]:
    """Say in the message of a ValueError or TypeError which batch it was."""
    try:
        yield
    except (ValueError, TypeError) as error:
        # Others may have more to tell than a message.
        if type(error) not in (ValueError, TypeError, NotFiniteError):
            raise
        raise type(error)(f"batch {index} of data: {error}") from error


def count_examples(inputs: Any, batch_size_fn: Callable[[Any], int] | None) -> int:
    """Return the number of examples in a batch's inputs.

    Raises:
        TypeError: If the inputs are not tensors and no `batch_size_fn` was given.
        ValueError: If there are no examples.
    """
    if batch_size_fn is not None:
        count = batch_size_fn(inputs)
    elif (first := next(tensors_in(inputs), None)) is not None and first.ndim > 0:
        count = first.shape[0]
    else:
        raise TypeError(
            f"the number of examples in inputs of type {type(inputs).__name__} is not obvious; "
            f"pass batch_size_fn, a function from inputs to their number of examples"
        )
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"a batch has {count!r} examples; expected at least 1")
    return count
