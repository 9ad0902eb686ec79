"""Models that bring their own loss: how a penalty consolidates them without being told of it.

The models of a framework may know their loss, and take batches of a form of their own. What the
integration of the framework says of them stands here, in a table by the name of the framework's
package. An integration is imported when the first of its models comes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Any, Final, NamedTuple

from torch import Tensor, nn

from rotate_ewc._utils.parameters import check_initialised, named_parameters
from rotate_ewc._utils.preserve_state import generator_states, kept

_INTEGRATIONS: Final = {
    "transformers": "rotate_ewc.integrations.transformers",
    "peft": "rotate_ewc.integrations.transformers",
}


class OwnLoss(NamedTuple):
    """A model's own loss, in the terms of `EKFACPenalty.consolidate`.

    Attributes:
        loss_func: The loss of outputs and targets.
        data: Re-iterable batches (inputs, targets).
        forward: From a batch's inputs to outputs.
    """

    loss_func: Callable[..., Any]
    data: Iterable[Any]
    forward: Callable[[Any], Tensor]


Reader = Callable[[nn.Module, Iterable[Any]], OwnLoss]
_READERS: Final[dict[str, Reader]] = {}


def register_own_loss(package: str, reader: Reader) -> None:
    """Say how the models of a package tell their loss.

    Args:
        package: Name of the package in which the models' classes, or some of their bases, are.
        reader: From a model and the user's batches to the model's own loss.
    """
    _READERS[package] = reader


def own_loss_of(model: nn.Module, data: Iterable[Any]) -> OwnLoss:
    """Return a model's own loss, and its batches as inputs and targets.

    Args:
        model: The model, without wrappers.
        data: Its batches, in the form that its framework gives them.

    Raises:
        ValueError: If the model is of no framework whose models bring a loss, if the framework's
            integration finds none, or if layers have no sizes before a first batch.
    """
    check_initialised(named_parameters(model))
    for kind in type(model).__mro__:
        package = kind.__module__.partition(".")[0]
        if package not in _READERS and package in _INTEGRATIONS:
            importlib.import_module(_INTEGRATIONS[package])
        if package in _READERS:
            with kept(generator_states(data)):
                return _READERS[package](model, data)
    raise ValueError(
        f"loss_func is None, but model is {type(model).__name__}, which has no loss of its own; "
        f"expected a loss such as torch.nn.CrossEntropyLoss(), or a model of transformers"
    )
