"""The batches that `fit` trains on, as the penalty takes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import wraps
from itertools import islice
from typing import Any, Final

import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision

from rotate_ewc._utils.preserve_state import generator_states, kept
from rotate_ewc.integrations.loaders import first_batch, number_of_examples

_SEED: Final = 0


@dataclass(frozen=True)
class FitBatches:
    """Batches, as many as an epoch has, in the precision that `fit` trains in.

    Attributes:
        data: Where they come from; by this name the states of its generators are found.
        limit: How many there are at most; of these, each pass has the same ones.
        convert: Converts a batch.
        mappings: Whether a batch may be a mapping.
    """

    data: Iterable[Any]
    limit: int | None
    convert: Callable[[Any], Any]
    mappings: bool

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches."""
        with kept(() if self.limit is None else generator_states(self.data)):
            if self.limit is not None:
                # A loader that shuffles would draw other ones each time; what it draws from is
                # restored by the estimate.
                torch.default_generator.manual_seed(_SEED)
                if (own := getattr(self.data, "generator", None)) is not None:
                    own.manual_seed(_SEED)
            for index, batch in enumerate(islice(self.data, self.limit)):
                if isinstance(batch, Mapping) and not self.mappings:
                    raise ValueError(_of_mapping(batch, index))
                yield self.convert(batch)

    def first(self, *, given: bool) -> FitBatches | None:
        """Return what may be read before training: a batch such as the first; None is nothing.

        Args:
            given: Whether the batches are for the estimate alone, so that reading them is no harm.
        """
        batches = first_batch(self.data)
        if batches is None and given:
            batches = self.data
        return None if batches is None else replace(self, data=batches, limit=None)


def batches_of_fit(trainer: Trainer, given: Iterable[Any] | None, *, mappings: bool) -> FitBatches:
    """Return the batches to consolidate.

    Args:
        trainer: The trainer, whose data are set up.
        given: What the user gives instead of the training data.
        mappings: Whether a batch may be a mapping.

    Raises:
        ValueError: If the training data may have no end, or come from several loaders.
    """
    convert = trainer.precision_plugin.convert_input
    if given is not None:
        return FitBatches(given, None, convert, mappings)
    loader: Any = trainer.train_dataloader
    if isinstance(loader, (Mapping, list, tuple)):
        raise ValueError(
            f"the training data are {len(loader)} loaders, in a {type(loader).__name__}; expected "
            f"one, or RotatedEWCCallback(data=...), re-iterable batches for the estimate"
        )
    if math.isinf(trainer.num_training_batches):
        _check_end(trainer)
        return FitBatches(loader, None, convert, mappings)
    limit = int(trainer.num_training_batches)
    whole = (sized_len(loader) or math.inf) <= limit
    return FitBatches(loader, None if whole else limit, convert, mappings)


def examples_of_fit(trainer: Trainer) -> int | None:
    """Return how many examples an epoch has, in all processes; None if that is not known."""
    loader: Any = trainer.train_dataloader
    known = number_of_examples(loader)
    size = getattr(loader, "batch_size", None)
    if size is None or math.isinf(trainer.num_training_batches):
        return known
    limited: int = int(trainer.num_training_batches) * size * trainer.world_size
    return limited if known is None else min(known, limited)


def in_precision(trainer: Trainer, forward: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a forward function that runs as in a step of `fit`, but without autocast."""
    plugin = trainer.precision_plugin
    if not isinstance(plugin, (DoublePrecision, HalfPrecision)):
        return forward

    @wraps(forward, assigned=(), updated=())
    def inside(inputs: Any) -> Any:
        with plugin.forward_context():
            return forward(inputs)

    return inside


def _check_end(trainer: Any) -> None:
    """Raise if training may end although its data do not."""
    if trainer.max_steps >= 0 or any(isinstance(c, Timer) for c in trainer.callbacks):
        raise ValueError(
            "the training data have no length, and may have no end, which an estimate could not "
            "wait for; expected Trainer(limit_train_batches=...), with the number of batches in "
            "an epoch, or RotatedEWCCallback(data=...), re-iterable batches for the estimate"
        )


def _of_mapping(batch: Mapping[Any, Any], index: int) -> str:
    return (
        f"batch {index} of data is a {type(batch).__name__} with {list(batch)}, but loss_func is "
        f"given; expected pairs (inputs, targets): pass RotatedEWCCallback(data=...) with such "
        f"pairs, made of the batches, and forward=... if the model does not take such inputs; or, "
        f"for a model of transformers with a loss of its own, its name: submodule=..., without "
        f"loss_func"
    )
