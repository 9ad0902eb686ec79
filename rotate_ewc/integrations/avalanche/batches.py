"""Avalanche's experiences and minibatches, as the penalty takes them.

A strategy may unpack its minibatches, run its model and call its loss in its own way. So all three
are left to the strategy: a batch's inputs are the unpacked minibatch, and outputs and targets what
`strategy.criterion()` gives to the loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Final

import torch
from avalanche.training.templates.problem_type import SupervisedProblem
from torch import Tensor
from torch.utils.data import DataLoader

from rotate_ewc._utils.preserve_state import Setting, kept, undisturbed
from rotate_ewc.losses import likelihood_of
from rotate_ewc.options import FisherType

_OWN_STEPS: Final = ("_unpack_minibatch", "mb_x", "mb_y", "mb_task_id", "forward", "criterion")


class Minibatches:
    """A strategy's minibatches with the targets that its loss gets: `(minibatch, targets)`."""

    def __init__(self, loader: DataLoader[Any], strategy: Any) -> None:
        """Wrap a loader of minibatches that are not unpacked."""
        self._loader = loader
        self._strategy = strategy

    def __len__(self) -> int:
        """Return the number of minibatches."""
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        """Yield the minibatches."""
        for minibatch in self._loader:
            self._strategy.mbatch = minibatch
            self._strategy._unpack_minibatch()
            yield self._strategy.mbatch, self._targets()

    def _targets(self) -> Any:
        if not _has_own(self._strategy, ("criterion",)):
            return self._strategy.mb_y
        # It may make targets of outputs, such as those of the positions that are no padding.
        with torch.no_grad():
            self._strategy.mb_output = self._strategy.forward()
            return loss_arguments(self._strategy)[1]


def outputs_for(strategy: Any, minibatch: Any) -> Any:
    """Return the outputs that a strategy gives to its loss for an unpacked minibatch."""
    strategy.mbatch = minibatch
    strategy.mb_output = strategy.forward()
    return loss_arguments(strategy)[0]


def preserved(strategy: Any) -> AbstractContextManager[None]:
    """Restore the attributes of a strategy, such as the minibatch and its outputs, on leaving."""
    attributes = vars(strategy)

    def restore(found: dict[str, Any]) -> None:
        for name in attributes.keys() - found.keys():
            del attributes[name]
        attributes.update(found)

    return kept([Setting(("strategy", id(strategy)), lambda: dict(attributes), restore)])


def check_steps(strategy: Any, minibatches: Minibatches, fisher_type: FisherType) -> None:
    """Raise if what a strategy does in its own way cannot be consolidated later.

    It looks at one minibatch, or at none if the strategy does everything as Avalanche does.

    Raises:
        ValueError: If an option of the loss is not supported, or `criterion` does more than call
            it.
        TypeError: If the Fisher type needs to know more of the loss, or it does not get two
            tensors.
    """
    likelihood_of(strategy._criterion, fisher_type)
    if not _has_own(strategy, _OWN_STEPS):
        return
    with preserved(strategy), undisturbed(strategy.model.modules(), ()), torch.no_grad():
        for minibatch, targets in minibatches:
            outputs = outputs_for(strategy, minibatch)
            if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
                raise TypeError(
                    f"{type(strategy).__name__} gives its loss outputs of type "
                    f"{type(outputs).__name__} and targets of type {type(targets).__name__}; "
                    f"expected tensors: return one from forward(), such as the logits, and have "
                    f"mb_y return the other"
                )
            break


def whole_task(experience: Any) -> Any:
    """Return the experience that holds the whole task; online streams cut it into parts.

    The parts of streams that fade from task to task belong to none, and stand for themselves.
    """
    return getattr(experience.logging(), "origin_experience", None) or experience


def _has_own(strategy: Any, names: tuple[str, ...]) -> bool:
    """Whether a strategy does one of several things in another way than Avalanche."""
    return any(
        name in vars(strategy)
        or getattr(type(strategy), name, None) is not getattr(SupervisedProblem, name)
        for name in names
    )


def loss_arguments(strategy: Any) -> tuple[Any, Any]:
    """Return the outputs and targets that a strategy's `criterion()` gives to its loss."""
    calls: list[tuple[Any, Any]] = []
    loss = torch.zeros(())

    def note(input: Any, target: Any) -> Tensor:
        calls.append((input, target))
        return loss

    criterion, strategy._criterion = strategy._criterion, note
    try:
        returned = strategy.criterion()
    finally:
        strategy._criterion = criterion
    if len(calls) != 1 or returned is not loss:
        raise ValueError(
            f"{type(strategy).__name__}.criterion() calls self._criterion {len(calls)} times, and "
            f"returns {'that loss' if returned is loss else 'something else'}; expected it to "
            f"return self._criterion(outputs, targets): add other terms to strategy.loss, in "
            f"before_backward of a plugin"
        )
    return calls[0]
