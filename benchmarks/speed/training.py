"""One case of training: steps, penalties and the peers' quadratic forms, within one process."""

import copy
import dataclasses

import torch
from torch import Tensor

from benchmarks.speed import names, steps
from benchmarks.speed.cases import Workload, build_step
from benchmarks.speed.contenders import BY_NAME
from benchmarks.speed.penalty_command import Options
from benchmarks.speed.results import MEASURED, MISSING, REFUSED, WRONG, Result, Training
from benchmarks.speed.rounds import WARM_UPS, time_in_rounds
from benchmarks.speed.steps import History, Work, live
from benchmarks.versions import versions

# Nngeometry takes weight and bias in one block, and has other sampled labels.
LARGEST_FACTORS = {names.NNGEOMETRY: 10.0, names.CURVLINOPS: 1.01}
# Steps of networks with many products are long enough to need few of them.
REPETITIONS = {names.TINY_MLP: 20, names.SMALL_MLP: 20}
FEW_REPETITIONS = 3
STEPS_PER_CALL = {names.TANGENT: names.TANGENT_EVERY}


def measure(case: str, options: Options) -> Training:
    """Consolidate tasks, and time everything that is there then."""
    workload = build_step(case, quick=options.quick)
    separate = options.separate_tasks if case in names.WITH_SEPARATE else 0
    history = live(workload, options.tasks, [separate] if separate else [])
    works, known = enter(case, history)
    repetitions = 1 if options.quick else REPETITIONS.get(case, FEW_REPETITIONS)
    times = time_in_rounds(
        works,
        rounds=options.rounds,
        repetitions=repetitions,
        # What is slow needs little warming up.
        warm_ups=WARM_UPS if repetitions > WARM_UPS else 1,
    )
    results = {name: known.get(name, Result(name, MEASURED)) for name in (*times, *known)}
    for name, seconds in times.items():
        results[name].seconds = [time / STEPS_PER_CALL.get(name, 1) for time in seconds]
    return Training(
        case=case,
        batch=workload.examples,
        rounds=options.rounds,
        results=list(results.values()),
        versions=versions(),
        parameters=sum(parameter.numel() for parameter in workload.model.parameters()),
        repetitions=repetitions,
        tasks=list(options.tasks),
    )


def enter(case: str, history: History) -> tuple[dict[str, Work], dict[str, Result]]:
    """Make all contenders of a case, neighbours if they are compared.

    Returns:
        Functions that do the work once, or as many times as there are steps in a call; and what is
        known of some contenders before anything is timed.
    """
    workload, merged = history.workload, history.merged
    last, given = merged[max(merged)], copy.deepcopy(merged[max(merged)])
    given.strength = 1.0
    works = {
        names.STEP: steps.training_steps(workload),
        names.ATTACHED: steps.training_steps(workload, given, "rotated"),
        names.FINDING: steps.training_steps(workload, last, "rotated"),
        names.GRADIENT: steps.training_steps(workload, given, "gradient"),
        names.TANGENT: steps.training_steps(workload, given, "tangent", names.TANGENT_EVERY),
    }
    for tasks, penalty in merged.items():
        name = names.after(names.STEP_WITH_PENALTY, tasks)
        works[name] = steps.training_steps(workload, penalty)
    for tasks, penalty in merged.items():
        works[names.after(names.PENALTY, tasks)] = steps.value_and_gradient(workload, penalty)
    ours = names.ours_beside_peers(case)
    if ours not in works:
        known = _copied(workload)
        known.freeze_other_parameters()
        works[ours] = steps.value_and_gradient(known, history.known)
    own = float(history.known(workload.model).detach())
    results = {peer: _enter_peer(peer, own, history, works) for peer in names.PEERS}
    results[ours] = Result(ours, MEASURED, values=[own])
    for tasks, penalty in history.separate.items():
        name = names.after(names.SEPARATE, tasks)
        works[name] = steps.value_and_gradient(workload, penalty)
    return works, results


def _copied(workload: Workload) -> Workload:
    """The same data, and a copy of the model."""
    return dataclasses.replace(workload, model=copy.deepcopy(workload.model))


def _enter_peer(peer: str, own: float, history: History, works: dict[str, Work]) -> Result:
    """Add a peer's value and gradient, if it is there and knows the case; compare the value."""
    adapter = BY_NAME[peer].adapter
    result = Result(peer, MISSING, version=adapter.version())
    if not adapter.installed():
        return result
    first, now = _copied(history.first), _copied(history.workload)
    first.freeze_other_parameters()
    anchors = [parameter.detach().clone() for parameter in first.known_parameters]
    parameters = now.known_parameters
    try:
        form = adapter.quadratic_form(first)

        def value() -> Tensor:
            return form([p - a for p, a in zip(parameters, anchors, strict=True)])

        theirs = value()
        gradients = torch.autograd.grad(theirs, parameters)
    # Packages refuse what they do not know in ways of their own.
    except Exception as error:
        result.status, result.message = REFUSED, f"{type(error).__name__}: {error}"
        return result
    works[peer] = lambda: torch.autograd.grad(value(), parameters)
    result.status, result.values = MEASURED, [float(theirs.detach())]
    factor, largest = result.values[0] / own if own else 0.0, LARGEST_FACTORS[peer]
    if not all(bool(gradient.isfinite().all()) for gradient in gradients):
        result.status, result.message = WRONG, "wrong: the gradient is not finite"
    elif not 1 / largest <= factor <= largest:
        result.status, result.message = WRONG, f"wrong ×{factor:.4g}"
    return result
