"""Loss families, a file each: the vectors whose outer products make a loss's Fisher matrix.

In come a model's outputs and the targets of one batch; out go vectors to back-propagate, and what
the batch adds to the number that the reduction `mean` divides by. To teach the package a loss,
write a `Likelihood`, and add it to `_FACTORIES` or pass it to `register_likelihood`. Nothing here
may know of models, layers or parameters, or import from `tracing` or `estimation`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch.nn.functional as F
from torch import nn

from rotate_ewc.losses.base import Likelihood
from rotate_ewc.losses.categorical import Categorical
from rotate_ewc.losses.elementwise import Bernoulli, Gaussian

Factory = Callable[[Any], Likelihood]

_FACTORIES: Final[dict[Any, Factory]] = {
    nn.CrossEntropyLoss: Categorical.of,
    nn.MSELoss: Gaussian.of,
    nn.BCEWithLogitsLoss: Bernoulli.of,
    F.cross_entropy: lambda _: Categorical.of(nn.CrossEntropyLoss()),
    F.mse_loss: lambda _: Gaussian.of(nn.MSELoss()),
    F.binary_cross_entropy_with_logits: lambda _: Bernoulli.of(nn.BCEWithLogitsLoss()),
}


def register_likelihood(loss: type | Callable[..., Any], factory: Factory) -> None:
    """Teach the package a loss.

    Args:
        loss: A loss's class, which must be that of the loss itself and not one it inherits from; or
            a loss function.
        factory: From the loss (an object of the class, or the function) to its `Likelihood`.

    Raises:
        TypeError: If `loss` or `factory` cannot be called.
    """
    for name, value in (("loss", loss), ("factory", factory)):
        if not callable(value):
            raise TypeError(f"{name} is {value!r}; expected a class or a function")
    _FACTORIES[loss] = factory


def likelihood_of(loss_func: Callable[..., Any]) -> Likelihood:
    """Return the likelihood behind a loss function.

    Args:
        loss_func: A `CrossEntropyLoss`, `MSELoss` or `BCEWithLogitsLoss` with reduction `"mean"` or
            `"sum"`, its functional twin with default arguments (such as `F.cross_entropy`), or a
            loss that was registered.

    Raises:
        ValueError: If the loss, its reduction or one of its options is not supported.
        TypeError: If a registered factory returns something else than a `Likelihood`.
    """
    kind: Any = type(loss_func) if isinstance(loss_func, nn.Module) else loss_func
    try:
        factory = _FACTORIES.get(kind) or _FACTORIES.get(type(loss_func))
    except TypeError:  # not hashable, so not registered either
        factory = None
    if factory is None:
        described = kind.__name__ if isinstance(loss_func, nn.Module) else repr(loss_func)
        raise ValueError(
            f"loss_func is {described}, which is not supported; expected CrossEntropyLoss, MSELoss "
            f"or BCEWithLogitsLoss from torch.nn, or a loss made known by register_likelihood"
        )
    likelihood = factory(loss_func)
    if not isinstance(likelihood, Likelihood):
        raise TypeError(
            f"the factory registered for loss_func returned {type(likelihood).__name__}; expected "
            f"a Likelihood"
        )
    if likelihood.reduction not in ("mean", "sum"):
        raise ValueError(
            f"loss_func {likelihood.name} has reduction={likelihood.reduction!r}; expected 'mean' "
            f"or 'sum', because the scale of the Fisher matrix follows from the reduction"
        )
    return likelihood


__all__ = ["Likelihood", "likelihood_of", "register_likelihood"]
