"""The batches that `fit` trains on, as the penalty takes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import wraps
from itertools import islice
from typing import Any, Final

import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from rotate_ewc._utils.preserve_state import kept, mode
from rotate_ewc.integrations.loaders import begin_pass, first_batch, number_of_examples

# Precisions in which steps have another default dtype, without autocast.
_OF_DTYPE: Final = (DoublePrecision, HalfPrecision)


@dataclass(frozen=True)
class FitBatches:
    """Batches, as many as an epoch has, as `fit` hands them to the module's `training_step`.

    Every pass over them begins with the same random numbers, so that loaders may shuffle, and
    hooks of the module may augment at random.

    Attributes:
        data: Where they come from; by this name the states of its generators are found.
        limit: How many there are at most; of these, each pass has the same ones.
        convert: Converts a batch.
        mappings: Whether a converted batch may be a mapping.
        device: The device on which hooks may draw random numbers.
    """

    data: Iterable[Any]
    limit: int | None
    convert: Callable[[Any], Any]
    mappings: bool
    device: torch.device | None = None

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches; the caller must restore the states of random numbers."""
        begin_pass(self.data, self.device)
        for index, given in enumerate(islice(self.data, self.limit)):
            batch = self.convert(given)
            if isinstance(batch, Mapping) and not self.mappings:
                raise ValueError(_of_mapping(batch, index))
            yield batch

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
        given: What the user gives instead of the training data; the module's hooks do not see it.
        mappings: Whether a batch may be a mapping.

    Raises:
        ValueError: If the training data may have no end, or come from several loaders.
    """
    if given is not None:
        return FitBatches(given, None, trainer.precision_plugin.convert_input, mappings)
    loader: Any = trainer.train_dataloader
    if isinstance(loader, (Mapping, list, tuple)):
        raise ValueError(
            f"the training data are {len(loader)} loaders, in a {type(loader).__name__}; expected "
            f"one, or RotatedEWCCallback(data=...), re-iterable batches for the estimate"
        )
    limit: int | None = None
    if math.isinf(trainer.num_training_batches):
        _check_end(trainer)
    elif (sized_len(loader) or math.inf) > trainer.num_training_batches:
        limit = int(trainer.num_training_batches)
    device = trainer.strategy.root_device
    return FitBatches(loader, limit, _as_in_training(trainer), mappings, device)


def examples_of_fit(trainer: Trainer) -> int | None:
    """Return how many examples an epoch has, in all processes; None if that is not known."""
    loader: Any = trainer.train_dataloader
    known = number_of_examples(loader)
    size = getattr(loader, "batch_size", None)
    if size is None or math.isinf(trainer.num_training_batches):
        return known
    limited: int = int(trainer.num_training_batches) * size * trainer.world_size
    return limited if known is None else min(known, limited)


def forward_context(trainer: Trainer) -> AbstractContextManager[None]:
    """Return what a step of `fit` runs in, but without autocast."""
    plugin = trainer.precision_plugin
    return plugin.forward_context() if isinstance(plugin, _OF_DTYPE) else nullcontext()


def in_precision(trainer: Trainer, forward: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a forward function that runs as in a step of `fit`, but without autocast."""
    plugin = trainer.precision_plugin
    if not isinstance(plugin, _OF_DTYPE):
        return forward

    @wraps(forward, assigned=(), updated=())
    def inside(inputs: Any) -> Any:
        with plugin.forward_context():
            return forward(inputs)

    return inside


def _as_in_training(trainer: Trainer) -> Callable[[Any], Any]:
    """Return what `fit` does to a batch: its precision, and the hooks around its transfer.

    Hooks find modules in the modes that they have now, as training begins. `fit` does not call them
    for a `training_step` that takes the iterator of batches.
    """
    module = trainer.lightning_module
    if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
        return trainer.precision_plugin.convert_input
    modes = [(part, part.training) for part in module.modules()]

    def convert(given: Any) -> Any:
        with kept(mode(part, training=training) for part, training in modes):
            batch = trainer.precision_plugin.convert_input(given)
            batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
            return trainer.strategy.batch_to_device(batch, dataloader_idx=0)

    return convert


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
