"""How strong a penalty should be, measured instead of guessed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from rotate_ewc._utils.parameters import parameters_of, unwrapped
from rotate_ewc._utils.preserve_state import undisturbed
from rotate_ewc._utils.reached_modules import reached_modules
from rotate_ewc.linalg.quadratic import quadratic_form
from rotate_ewc.losses import Likelihood, likelihood_of
from rotate_ewc.options import Reduction
from rotate_ewc.penalty.penalty import EKFACPenalty
from rotate_ewc.penalty.weighting import kept_terms
from rotate_ewc.tracing.passes import batches, check_reiterable


def calibrated_strength(
    penalty: EKFACPenalty,
    model: nn.Module,
    loss_func: Callable[..., Any],
    old_data: Iterable[Any],
) -> float:
    """Return the strength at which the penalty is the harm that was done to the first task.

    To be asked after the second task has been trained (with strength 1, for example) and before it
    is consolidated, while data of the first are still at hand:

        (L(θ) - L(θ*)) / (½ (θ - θ*)ᵀ F (θ - θ*))

    with L the mean loss on the first task's data. Were the loss the quadratic that the penalty
    takes it for, that would be 1. For a network that fits its task well it is usually more: its
    Fisher matrix is small at the solution, and grows on the way from it. No later task is
    looked at; the harm of many tasks adds up to more, so take this as a lower bound for long
    streams (`docs/results.md` compares it with a grid).

    θ* has the protected parameters as they were consolidated, and all else (buffers such as
    BatchNorm's statistics too) as it is now. The model and the random states are left as they were.

    Args:
        penalty: A penalty that has consolidated one task, with weight 1.
        model: The model, trained on a second task; called as `model(inputs)`.
        loss_func: The loss with which the first task was consolidated.
        old_data: The first task's data, as re-iterable batches (inputs, targets). What was
            trained on gives larger values than what was held out.

    Returns:
        The strength; 0 with a warning if the second task did no harm.

    Raises:
        ValueError: If the penalty has not consolidated one task exactly, the model has not moved
            since or diverged, the loss is another, or a batch cannot be handled.
        TypeError: If an argument has the wrong type.
    """
    if not isinstance(penalty, EKFACPenalty):
        raise TypeError(f"penalty is {type(penalty).__name__}; expected an EKFACPenalty")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; expected a torch.nn.Module")
    if penalty.num_tasks != 1:
        raise ValueError(
            f"penalty has consolidated {penalty.num_tasks} tasks; expected one: calibrate after "
            f"the second task has been trained and before it is consolidated"
        )
    model, likelihood = unwrapped(model), likelihood_of(loss_func)
    _check_same_loss(penalty, likelihood)
    parameters = parameters_of(model)
    predicted = _predicted_increase(penalty, parameters)
    anchor = {**parameters, **penalty.terms[0].anchor}
    with undisturbed(reached_modules(model), parameters.values()), torch.no_grad():
        check_reiterable(old_data)
        before, now = _mean_losses(
            model,
            [anchor, parameters],
            loss_func,
            likelihood,
            old_data,
        )
    _check_finite({"predicted increase": predicted, "loss before": before, "loss now": now})
    if now <= before:
        warnings.warn(
            f"the loss on old_data went from {before:.6g} to {now:.6g} while the second task was "
            f"trained: there was no harm to measure, and the strength is 0",
            UserWarning,
            stacklevel=2,
        )
    return max(0.0, now - before) / predicted


def _check_same_loss(penalty: EKFACPenalty, likelihood: Likelihood) -> None:
    """Raise unless the harm is measured in the unit in which it is predicted."""
    provenance = penalty.terms[0].operator.provenance
    for what in ("loss", "reduction"):
        known = getattr(provenance, what)
        given = likelihood.name if what == "loss" else likelihood.reduction
        if given != known:
            raise ValueError(
                f"loss_func has {what} {given!r}, but the task was consolidated with {known!r}; "
                f"expected the same"
            )


def _predicted_increase(penalty: EKFACPenalty, parameters: Mapping[str, Tensor]) -> float:
    """Return `½ (θ - θ*)ᵀ F (θ - θ*)` for the Fisher matrix of the mean loss."""
    (term,) = penalty.terms
    blocks = [stack.block for stack in penalty.stacks]
    with torch.no_grad():
        value = float(0.5 * quadratic_form(blocks, penalty.deltas(parameters)))
    if value <= 0:
        raise ValueError(
            "the model is where it was when the task was consolidated, as far as the penalty can "
            "tell; expected one that has been trained on a second task"
        )
    return value / kept_terms(term.operator.provenance.num_loss_terms, penalty.weighting)


def _mean_losses(
    model: nn.Module,
    candidates: list[Mapping[str, Tensor]],
    loss_func: Callable[..., Any],
    likelihood: Likelihood,
    data: Iterable[Any],
) -> list[float]:
    """Return the mean loss (whatever the reduction) at each set of parameters.

    All are evaluated on a batch before the next is read: data may be random.
    """
    totals, mass = [0.0 for _ in candidates], 0.0
    device = next(iter(candidates[0].values())).device
    for _, inputs, targets in batches(data, device, progressbar=False, description=""):
        losses, terms = [], 0.0
        for parameters in candidates:
            outputs = functional_call(model, dict(parameters), (inputs,))
            likelihood.check(outputs, targets)
            terms = float(likelihood.num_terms(outputs, targets))
            losses.append(float(loss_func(outputs, targets)))
        if terms > 0:  # or else all labels are ignored, and their mean loss is no number
            factor = 1.0 if likelihood.reduction == Reduction.SUM else terms
            mass += terms
            totals = [total + loss * factor for total, loss in zip(totals, losses, strict=True)]
    if mass == 0:
        raise ValueError("all labels of old_data are ignored; expected some that count")
    return [total / mass for total in totals]


def _check_finite(values: Mapping[str, float]) -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            raise ValueError(
                f"the {name} is {value}, not finite: the model has diverged, or old_data has such "
                f"values"
            )
