"""Find the likelihood behind a loss."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final

import torch.nn.functional as F
from torch import nn

from rotate_ewc.losses.base import Likelihood
from rotate_ewc.losses.categorical import Categorical
from rotate_ewc.losses.counts import Poisson
from rotate_ewc.losses.elementwise import Bernoulli, Gaussian
from rotate_ewc.losses.empirical import Empirical, EmpiricalLoss
from rotate_ewc.losses.gaussian import GaussianVariance
from rotate_ewc.losses.heads import Heads, SumOfLosses
from rotate_ewc.losses.log_probabilities import LogProbabilities
from rotate_ewc.losses.model_loss import ModelLoss, OwnLosses
from rotate_ewc.losses.probabilities import Probabilities
from rotate_ewc.losses.residuals import Residual
from rotate_ewc.options import FisherType

Factory = Callable[[Any], Likelihood]

_FACTORIES: Final[dict[Any, Factory]] = {
    nn.CrossEntropyLoss: Categorical.of,
    nn.NLLLoss: LogProbabilities.of,
    nn.BCEWithLogitsLoss: Bernoulli.of,
    nn.BCELoss: Probabilities.of,
    nn.MSELoss: Gaussian.of,
    nn.GaussianNLLLoss: GaussianVariance.of,
    nn.HuberLoss: Residual.of_huber,
    nn.SmoothL1Loss: Residual.of_smooth_l1,
    nn.PoissonNLLLoss: Poisson.of,
}

_FUNCTIONS: Final[dict[Any, type[nn.Module]]] = {
    F.cross_entropy: nn.CrossEntropyLoss,
    F.nll_loss: nn.NLLLoss,
    F.binary_cross_entropy_with_logits: nn.BCEWithLogitsLoss,
    F.binary_cross_entropy: nn.BCELoss,
    F.mse_loss: nn.MSELoss,
    F.gaussian_nll_loss: nn.GaussianNLLLoss,
    F.huber_loss: nn.HuberLoss,
    F.smooth_l1_loss: nn.SmoothL1Loss,
    F.poisson_nll_loss: nn.PoissonNLLLoss,
}
"""Functions of torch, with the modules that do the same with the same options."""


def register_likelihood(loss: type | Callable[..., Any], factory: Factory) -> None:
    """Add a loss to the package.

    Args:
        loss: A loss's class, which also stands for those that inherit `forward` from it; or a loss
            function.
        factory: From the loss (an object of the class, or the function) to its `Likelihood`.

    Raises:
        TypeError: If `loss` or `factory` cannot be called.
    """
    for name, value in (("loss", loss), ("factory", factory)):
        if not callable(value):
            raise TypeError(f"{name} is {value!r}; expected a class or a function")
    _FACTORIES[loss] = factory


def likelihood_of(
    loss_func: Callable[..., Any], fisher_type: FisherType = FisherType.MC
) -> Likelihood:
    """Return the likelihood behind a loss function.

    Args:
        loss_func: A loss that is built in, as a module or as the function of `torch.nn.functional`
            (also in a `functools.partial` with options by keyword), or one that was registered.
        fisher_type: The Fisher type that it has to serve.

    Raises:
        ValueError: If the loss's reduction or one of its options is not supported.
        TypeError: If the distribution behind the loss is not known, and the Fisher type needs it;
            or if a registered factory returns something other than a `Likelihood`.
    """
    if not callable(loss_func):
        raise TypeError(
            f"loss_func is {type(loss_func).__name__} {loss_func!r:.50}; expected a loss, such as "
            f"torch.nn.CrossEntropyLoss()"
        )
    _refuse_class(loss_func)
    if isinstance(loss_func, ModelLoss) and fisher_type is FisherType.EMPIRICAL:
        return OwnLosses.of(loss_func)
    found = _likelihood(loss_func)
    if found is not None:
        return _checked(found)
    if fisher_type is FisherType.EMPIRICAL:
        return Empirical.of(loss_func, name_of(loss_func))
    raise TypeError(_unknown(loss_func, fisher_type))


def _refuse_class(loss_func: Any) -> None:
    """Raise if a loss, or a part of one, is a class, of which somebody forgot to make an object."""
    if isinstance(loss_func, SumOfLosses):
        for part in loss_func.losses.values():
            _refuse_class(part)
    if isinstance(loss_func, (EmpiricalLoss, ModelLoss)):
        loss_func = loss_func.function
    if isinstance(loss_func, type):
        name = loss_func.__name__
        name = f"nn.{name}" if getattr(nn, name, None) is loss_func else name
        raise TypeError(f"loss_func is the class {name}; expected an object: pass {name}()")


def _likelihood(loss_func: Callable[..., Any]) -> Likelihood | None:
    """Return what the loss's factory makes; None if a part of the loss is not known."""
    if type(loss_func) is SumOfLosses:
        parts = {key: _likelihood(part) for key, part in loss_func.losses.items()}
        return Heads.of(loss_func, parts)
    factory = _factory(loss_func)
    if factory is not None:
        likelihood = factory(loss_func)
        if not isinstance(likelihood, Likelihood):
            raise TypeError(
                f"the factory registered for loss_func returned {type(likelihood).__name__}; "
                f"expected a Likelihood"
            )
        return likelihood
    module = _as_module(loss_func)
    return None if module is None else _FACTORIES[type(module)](module)


def _factory(loss_func: Callable[..., Any]) -> Factory | None:
    """Return the factory of a loss, of its class, or of a class whose `forward` it inherits."""
    if not isinstance(loss_func, nn.Module):
        try:
            return _FACTORIES.get(loss_func) or _FACTORIES.get(type(loss_func))
        except TypeError:  # not hashable, so not registered either
            return None
    kind: Any = type(loss_func)
    base = next((base for base in kind.__mro__ if base in _FACTORIES), None)
    if base is None or "forward" in vars(loss_func):
        return None
    same = kind.forward is base.forward and kind.__call__ is base.__call__
    return _FACTORIES[base] if same else None


def _as_module(loss_func: Callable[..., Any]) -> nn.Module | None:
    """Return the module for a function of torch, or a `partial` of it; None if there is none."""
    options: dict[str, Any] = {}
    function: Any = loss_func
    if isinstance(loss_func, partial):
        if loss_func.args:
            return None
        function, options = loss_func.func, dict(loss_func.keywords)
    try:
        kind = _FUNCTIONS.get(function)
    except TypeError:  # not hashable
        return None
    if kind is None:
        return None
    try:
        return kind(**options)
    except TypeError as error:
        raise TypeError(
            f"loss_func is functools.partial({function.__name__}, ...) with the options "
            f"{sorted(options)}; expected those of torch.nn.{kind.__name__}: {error}"
        ) from error


def _checked(likelihood: Likelihood) -> Likelihood:
    """Check the reduction."""
    if likelihood.reduction not in ("mean", "sum"):
        raise ValueError(
            f"loss_func {likelihood.name} has reduction={likelihood.reduction!r}; expected 'mean' "
            f"or 'sum', because the scale of the Fisher matrix follows from the reduction"
        )
    return likelihood


def name_of(loss_func: Callable[..., Any]) -> str:
    """Return the name of a loss for messages."""
    if isinstance(loss_func, nn.Module):
        return type(loss_func).__name__
    if isinstance(loss_func, (EmpiricalLoss, ModelLoss)):
        return f"{type(loss_func).__name__}({name_of(loss_func.function)})"
    return getattr(loss_func, "__name__", None) or repr(loss_func)


def _unknown(loss_func: Callable[..., Any], fisher_type: FisherType) -> str:
    known = ", ".join(kind.__name__ for kind in _FACTORIES if kind.__module__.startswith("torch."))
    return (
        f"loss_func is {name_of(loss_func)}, and the distribution of labels behind it, which "
        f"fisher_type={fisher_type.value!r} needs, is not known. Pass fisher_type='empirical', for "
        f"which any differentiable loss will do; or make the distribution known by "
        f"register_likelihood. Known are {known}, SumOfLosses of them, the functions of "
        f"torch.nn.functional that do the same, and modules that inherit forward from them"
    )
