"""How far predictions are softened for a snapshot, found from the predictions themselves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from rotate_ewc._utils.numerics import statistics_dtype
from rotate_ewc._utils.parameters import parameters_of
from rotate_ewc._utils.preserve_state import undisturbed
from rotate_ewc._utils.reached_modules import reached_modules
from rotate_ewc._utils.structure import tensors_of
from rotate_ewc._utils.validation import AUTO
from rotate_ewc.distributed.processes import Ranks
from rotate_ewc.losses import Likelihood
from rotate_ewc.options import EstimationSettings
from rotate_ewc.tracing.counting import ExampleCounter
from rotate_ewc.tracing.forward_pass import call
from rotate_ewc.tracing.passes import (
    Batch,
    ReiterableData,
    batches,
    naming_batch,
    noting_batch,
)

TARGET_ENTROPY: Final = 0.8
_LARGEST_TEMPERATURE: Final = 1e6
# To a part in a million.
_BISECTIONS: Final = 24


def softened(
    forward: Callable[[Any], Tensor], likelihood: Likelihood, temperature: float
) -> Callable[[Any], Tensor]:
    """Return a forward function with outputs of softened predictions."""
    if temperature == 1.0:
        return forward

    @wraps(forward, assigned=(), updated=())
    def divided(inputs: Any) -> Any:
        outputs = forward(inputs)
        # Others are refused where it is said how to make them tensors.
        if not isinstance(outputs, Tensor):
            return outputs
        return likelihood.current.softened(outputs, temperature)

    return divided


def fitting_temperature(
    asked: float | str,
    model: nn.Module,
    forward: Callable[[Any], Any],
    likelihood: Likelihood,
    data: ReiterableData,
    settings: EstimationSettings,
    ranks: Ranks,
) -> float:
    """Return the temperature that was asked for; find one for `"auto"`.

    Without predictions that can be softened, as in regression, it is 1.

    Raises:
        ValueError: If a number is given, but the distribution that the loss predicts is unknown.
    """
    if likelihood.can_be_softened:
        if not isinstance(asked, str):
            return asked
        return softening_temperature(model, forward, likelihood, data, settings, ranks)
    if not likelihood.has_distribution and asked not in (AUTO, 1.0):
        raise ValueError(
            f"temperature is {asked}, but {likelihood.name} gives only gradients, so there "
            f"are no predictions to soften; expected 1 or 'auto'"
        )
    return 1.0


def softening_temperature(
    model: nn.Module,
    forward: Callable[[Any], Any],
    likelihood: Likelihood,
    data: ReiterableData,
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
        likelihood: The distribution behind the loss.
        data: Batches (inputs, targets), gone through once.
        settings: Of the estimate. Outputs may take its memory budget; of more, every second batch
            is looked at, or fewer.
        ranks: The processes whose predictions count together, each with data of its own.

    Returns:
        At least 1; exactly 1 if the predictions are soft enough, or have no entropy (regression).
    """
    parameters = parameters_of(model)
    modules = [*model.modules(), *reached_modules(forward)]
    with undisturbed(modules, parameters.values(), data), torch.no_grad():
        device = next(iter(parameters.values())).device
        shown = batches(
            data,
            device,
            likelihood.batch_form,
            progressbar=bool(settings.progressbar),
            description="temperature",
            ranks=ranks,
        )
        seen = _seen(forward, likelihood, shown, settings, data)
        every = ranks.gather("outputs", None if seen is None else len(seen))
        if seen is None or None in every:
            return 1.0
        return _temperature_of(seen, ranks)


class Seen(NamedTuple):
    """Outputs and targets of a batch, the likelihood, which knows how they are packed, and size."""

    outputs: Tensor
    targets: Any
    likelihood: Likelihood
    num_examples: int

    @property
    def nbytes(self) -> int:
        """Memory that they take."""
        return self.outputs.nbytes + sum(t.nbytes for t in tensors_of(self.targets))


def _seen(
    forward: Callable[[Any], Any],
    likelihood: Likelihood,
    shown: Iterable[Batch],
    settings: EstimationSettings,
    data: ReiterableData,
) -> list[Seen] | None:
    """Return outputs and targets, as many as there is room for; None if nothing can be softened.

    Where all batches are looked at, the data learn how many examples there are.
    """
    counter = ExampleCounter(forward, settings.batch_size_fn)
    seen: list[Seen] = []
    stride, num_examples = 1, 0
    for number, inputs, targets in shown:
        if number % stride:
            continue
        with naming_batch(number), noting_batch(number):
            outputs = call(forward, inputs)
            found = _softenable(likelihood.current, inputs, outputs, targets, settings, counter)
            if found is None:
                return None
            seen.append(found)
            num_examples += found.num_examples
        while len(seen) > 1 and sum(batch.nbytes for batch in seen) > settings.memory_budget:
            seen, stride = seen[::2], 2 * stride
    if stride == 1:
        data.end_pass(num_examples)
    return seen


def _softenable(
    likelihood: Likelihood,
    inputs: Any,
    outputs: Any,
    targets: Any,
    settings: EstimationSettings,
    counter: ExampleCounter,
) -> Seen | None:
    """Return what was seen if predictions have an entropy; outputs that do not fit have none.

    Those are refused by the estimate that follows, which knows more to say.
    """
    if not isinstance(outputs, Tensor):
        return None
    try:
        targets = likelihood.completed_targets(outputs, targets, settings.fisher_type)
        likelihood.check(outputs, targets)
        num_examples = counter.count(inputs, outputs, targets)
    except (TypeError, ValueError):
        return None
    if likelihood.relative_entropies(outputs, targets) is None:
        return None
    return Seen(outputs, targets, likelihood, num_examples)


def _temperature_of(seen: Sequence[Seen], ranks: Ranks) -> float:
    """Return the temperature for outputs and targets by bisection of its logarithm."""
    if _mean_entropy(seen, 1.0, ranks) >= TARGET_ENTROPY:
        return 1.0
    low, high = 0.0, math.log(_LARGEST_TEMPERATURE)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if _mean_entropy(seen, math.exp(middle), ranks) < TARGET_ENTROPY:
            low = middle
        else:
            high = middle
    return math.exp(low)


def _mean_entropy(seen: Sequence[Seen], temperature: float, ranks: Ranks) -> float:
    """Return the mean over all predictions that count; 1 where none does."""
    total, count = 0.0, 0
    for outputs, targets, likelihood, _ in seen:
        outputs = outputs.to(statistics_dtype(outputs.dtype))
        softened = likelihood.softened(outputs, temperature)
        entropies = likelihood.relative_entropies(softened, targets)
        if entropies is not None:
            total, count = total + float(entropies.double().sum()), count + entropies.numel()
    sums = ranks.gather("entropies", (total, count))
    total, count = sum(one[0] for one in sums), sum(one[1] for one in sums)
    return total / count if count else 1.0
