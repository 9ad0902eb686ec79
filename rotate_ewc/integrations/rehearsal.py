"""What would fail at the end of training, found out before it begins, at the cost of one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

from torch import nn

from rotate_ewc._utils.parameters import parameters_of, unwrapped
from rotate_ewc.distributed.processes import Group, Ranks
from rotate_ewc.losses import likelihood_of
from rotate_ewc.penalty.penalty import EKFACPenalty


def rehearse(
    penalty: EKFACPenalty,
    model: nn.Module,
    loss_func: Callable[..., Any],
    data: Iterable[Any] | None,
    forward: Callable[[Any], Any] | None = None,
    *,
    group: Group = None,
) -> None:
    """Raise what consolidating would raise, as far as the model, the loss and one batch show.

    A penalty like this one consolidates the first batch up to where it would ask for the second,
    so that nothing is decomposed. Model, random states and the penalty stay as they are.

    Args:
        penalty: The penalty that is to consolidate when training ends.
        model: The model.
        loss_func: The loss.
        data: Its batches, of which the first is read; None where none may be read before training.
        forward: From a batch's inputs to outputs; None is the model.
        group: The processes that consolidate together, which fail together here.

    Raises:
        ValueError: If a pattern, parameter, layer, loss or the batch cannot be handled, naming it.
        TypeError: If the loss, or a part of the batch, has the wrong type.
    """
    with Ranks.of(group).together():
        likelihood = likelihood_of(loss_func, penalty.settings.fisher_type)
        earlier = {term.operator.provenance.reduction.value for term in penalty.terms}
        if earlier - {likelihood.final_reduction}:
            raise ValueError(
                f"loss_func has reduction {likelihood.final_reduction!r}, but earlier tasks had "
                f"{earlier.pop()!r}; expected the same for all tasks"
            )
        penalty.protected(parameters_of(unwrapped(model)))
        like = EKFACPenalty(
            temperature=1.0 if isinstance(penalty.temperature, str) else penalty.temperature,
            include=penalty.include,
            exclude=penalty.exclude,
            settings=replace(penalty.settings, progressbar=False),
        )
        # A loss with counts is counted in a pass of its own, before the first one with gradients.
        shown = _FirstBatch(data, passes=1 + bool(likelihood.has_counts))
        with suppress(_EnoughError):
            like.consolidate(model, loss_func, shown, forward=forward, group=None)


class _EnoughError(Exception):
    """The first batch was handled."""


class _FirstBatch:
    """Data that end a number of passes after their first batch, the last one by an error."""

    def __init__(self, data: Iterable[Any] | None, passes: int) -> None:
        """Begin.

        Args:
            data: The batches; None are none, and end the first pass by the error.
            passes: Number of passes.
        """
        self._data = data
        self._passes = passes

    def __iter__(self) -> Iterator[Any]:
        """Yield the first batch."""
        self._passes -= 1
        if self._data is not None:
            for batch in self._data:
                yield batch
                break
        if self._data is None or self._passes <= 0:
            raise _EnoughError
