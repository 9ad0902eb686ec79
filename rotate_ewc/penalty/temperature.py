"""How far predictions are softened for a snapshot, found from the predictions themselves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import Any, Final

import torch
from torch import Tensor, nn

from rotate_ewc._utils.numerics import statistics_dtype
from rotate_ewc._utils.parameters import parameters_of
from rotate_ewc._utils.preserve_state import undisturbed
from rotate_ewc._utils.reached_modules import reached_modules
from rotate_ewc.distributed.ranks import Ranks
from rotate_ewc.losses import Likelihood, likelihood_of
from rotate_ewc.options import EstimationSettings
from rotate_ewc.tracing.passes import (
    Batch,
    batches,
    check_reiterable,
    naming_batch,
    noting_batch,
)

TARGET_ENTROPY: Final = 0.8
_LARGEST_TEMPERATURE: Final = 1e6
# To a part in a million.
_BISECTIONS: Final = 24


def softened(forward: Callable[[Any], Tensor], temperature: float) -> Callable[[Any], Tensor]:
    """Divide outputs by a temperature."""
    if temperature == 1.0:
        return forward

    @wraps(forward, assigned=(), updated=())
    def divided(inputs: Any) -> Any:
        outputs = forward(inputs)
        # Others are refused where it is said how to make them tensors.
        return outputs / temperature if isinstance(outputs, Tensor) else outputs

    return divided


def softening_temperature(
    model: nn.Module,
    forward: Callable[[Any], Any],
    loss_func: Callable[..., Any],
    data: Iterable[Any],
    settings: EstimationSettings,
    ranks: Ranks,
) -> float:
    """Return the temperature at which predictions have a given mean entropy.

    A network that is sure of its examples has next to no Fisher matrix there, however much it will
    forget of them. Divided by T, its outputs have a larger entropy; T is found by bisection, so
    that the mean over all predictions is `TARGET_ENTROPY` of the largest possible one (log C for C
    classes). No labels are looked at, but for which of them count.

    Args:
        model: The model, which is left as it was.
        forward: From a batch's inputs to the model's outputs.
        loss_func: The loss.
        data: Re-iterable batches (inputs, targets), gone through once.
        settings: Of the estimate. Outputs may take its memory budget; of more, every second batch
            is looked at, or fewer.
        ranks: The processes whose predictions count together, each with data of its own.

    Returns:
        At least 1; exactly 1 if the predictions are soft enough, or have no entropy (regression).
    """
    parameters = parameters_of(model)
    modules = [*model.modules(), *reached_modules(forward)]
    check_reiterable(data)
    with undisturbed(modules, parameters.values()), torch.no_grad():
        likelihood = likelihood_of(loss_func)
        device = next(iter(parameters.values())).device
        shown = batches(
            data,
            device,
            progressbar=bool(settings.progressbar),
            description="temperature",
            ranks=ranks,
        )
        seen = _seen(forward, likelihood, shown, settings.memory_budget)
        every = ranks.gather("outputs", None if seen is None else len(seen))
        if seen is None or None in every:
            return 1.0
        return _temperature_of(seen, likelihood, ranks)


def _seen(
    forward: Callable[[Any], Any],
    likelihood: Likelihood,
    shown: Iterable[Batch],
    max_bytes: int,
) -> list[tuple[Tensor, Tensor]] | None:
    """Return outputs and targets, as many as there is room for; None if nothing can be softened."""
    seen: list[tuple[Tensor, Tensor]] = []
    stride = 1
    for number, inputs, targets in shown:
        if number % stride:
            continue
        with naming_batch(number), noting_batch(number):
            outputs = forward(inputs)
        if not _can_be_softened(likelihood, outputs, targets):
            return None
        seen.append((outputs, targets))
        while len(seen) > 1 and sum(o.nbytes + t.nbytes for o, t in seen) > max_bytes:
            seen, stride = seen[::2], 2 * stride
    return seen


def _can_be_softened(likelihood: Likelihood, outputs: Any, targets: Tensor) -> bool:
    """Return whether predictions have an entropy; outputs that do not fit have none.

    Those are refused by the estimate that follows, which knows more to say.
    """
    if not isinstance(outputs, Tensor):
        return False
    try:
        likelihood.check(outputs, targets)
    except (TypeError, ValueError):
        return False
    return likelihood.relative_entropies(outputs, targets) is not None


def _temperature_of(
    seen: Sequence[tuple[Tensor, Tensor]], likelihood: Likelihood, ranks: Ranks
) -> float:
    """Return the temperature for outputs and targets by bisection of its logarithm."""
    if _mean_entropy(seen, likelihood, 1.0, ranks) >= TARGET_ENTROPY:
        return 1.0
    low, high = 0.0, math.log(_LARGEST_TEMPERATURE)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if _mean_entropy(seen, likelihood, math.exp(middle), ranks) < TARGET_ENTROPY:
            low = middle
        else:
            high = middle
    return math.exp(low)


def _mean_entropy(
    seen: Sequence[tuple[Tensor, Tensor]], likelihood: Likelihood, temperature: float, ranks: Ranks
) -> float:
    """Return the mean over all predictions that count; 1 where none does."""
    total, count = 0.0, 0
    for outputs, targets in seen:
        softened = outputs.to(statistics_dtype(outputs.dtype)) / temperature
        entropies = likelihood.relative_entropies(softened, targets)
        if entropies is not None:
            total, count = total + float(entropies.double().sum()), count + entropies.numel()
    sums = ranks.gather("entropies", (total, count))
    total, count = sum(one[0] for one in sums), sum(one[1] for one in sums)
    return total / count if count else 1.0
