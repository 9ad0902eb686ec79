"""One case of training: steps, penalties and the peers' quadratic forms, within one process."""

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.speed import names, steps
from benchmarks.speed.cases import build_step
from benchmarks.speed.contenders import BY_NAME
from benchmarks.speed.history import History, live
from benchmarks.speed.penalty_command import Options
from benchmarks.speed.results import MEASURED, MISSING, REFUSED, WRONG, Result, Training
from benchmarks.speed.rounds import WARM_UPS, time_in_rounds
from benchmarks.versions import versions

# Nngeometry takes weight and bias in one block, and has other sampled labels.
LARGEST_FACTORS = {names.NNGEOMETRY: 10.0, names.CURVLINOPS: 1.01}
# Steps of networks with many products are long enough to need few of them.
REPETITIONS = {names.TINY_MLP: 20, names.SMALL_MLP: 20}
FEW_REPETITIONS = 3
STEPS_PER_CALL = {names.TANGENT: names.TANGENT_EVERY, names.PROXIMAL: names.PROXIMAL_EVERY}


@dataclass
class Field:
    """Who takes part in a case."""

    # Functions that do the work once, or as many times as there are steps in a call; those that
    # are compared as neighbours.
    works: dict[str, Callable[[], object]] = field(default_factory=dict)
    # What is known of some contenders before anything is timed.
    results: dict[str, Result] = field(default_factory=dict)


def measure(case: str, options: Options) -> Training:
    """Consolidate tasks, and time everything that is there then."""
    workload = build_step(case, quick=options.quick)
    separate = options.separate_tasks if case in names.WITH_SEPARATE else 0
    history = live(workload, options.tasks, [separate] if separate else [], separate)
    found = enter(case, history)
    repetitions = 1 if options.quick else REPETITIONS.get(case, FEW_REPETITIONS)
    times = time_in_rounds(
        found.works,
        rounds=options.rounds,
        repetitions=repetitions,
        # What is slow needs little warming up.
        warm_ups=WARM_UPS if repetitions > WARM_UPS else 1,
    )
    results = {
        name: dataclasses.replace(
            found.results.get(name, Result(name, MEASURED)),
            seconds=[time / STEPS_PER_CALL.get(name, 1) for time in times.get(name, [])],
        )
        for name in (*times, *found.results)
    }
    return Training(
        case=case,
        batch=workload.examples,
        rounds=options.rounds,
        results=list(results.values()),
        versions=versions(),
        parameters=sum(parameter.numel() for parameter in workload.model.parameters()),
        repetitions=repetitions,
        tasks=list(options.tasks),
        separate_tasks=options.separate_tasks,
    )


def enter(case: str, history: History) -> Field:
    """Make all contenders of a case."""
    found, workload, merged = Field(), history.workload, history.merged
    works, last = found.works, merged[max(merged)]
    works[names.STEP] = steps.plain_step(workload)
    for tasks, penalty in merged.items():
        works[names.step_after(tasks)] = steps.plain_step(workload, penalty)
    works[names.TANGENT] = steps.tangent_steps(workload, last)
    if case in names.PERCEPTRONS:
        works[names.PROXIMAL] = steps.proximal_steps(workload, last)
        works[names.ROTATED] = steps.rotated_step(workload, last)
    for tasks, penalty in merged.items():
        works[names.penalty_after(tasks)] = steps.value_and_gradient(workload, penalty)
    ours = names.ours_beside_peers(case)
    known = dataclasses.replace(workload, model=copy.deepcopy(workload.model))
    known.freeze_other_parameters()
    if ours == names.KNOWN:
        works[ours] = steps.value_and_gradient(known, history.known)
    for peer in names.PEERS:
        _enter_peer(found, peer, ours, history)
    for tasks, penalty in history.separate.items():
        works[names.separate(tasks)] = steps.value_and_gradient(workload, penalty)
        works[names.one_by_one(tasks)] = steps.value_and_gradient(workload, *history.single)
    return found


def _enter_peer(found: Field, peer: str, ours: str, history: History) -> None:
    """Add a peer, if it is there, knows the case and finds what it should."""
    adapter = BY_NAME[peer].adapter
    result = Result(peer, MISSING, version=adapter.version())
    if adapter.installed():
        try:
            result, found.works[peer] = _of_peer(peer, history)
        # Packages refuse what they do not know in ways of their own.
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
            result = dataclasses.replace(result, status=REFUSED, message=message)
    found.results[peer] = result
    own = float(history.known(history.workload.model).detach())
    found.results[ours] = Result(ours, MEASURED, values=[own])


def _of_peer(peer: str, history: History) -> tuple[Result, Callable[[], object]]:
    """A peer's value and gradient, and whether they are what they should be."""
    adapter = BY_NAME[peer].adapter
    first = dataclasses.replace(history.first, model=copy.deepcopy(history.first.model))
    first.freeze_other_parameters()
    anchors = [parameter.detach().clone() for parameter in first.known_parameters]
    form = adapter.quadratic_form(first)
    now = dataclasses.replace(history.workload, model=copy.deepcopy(history.workload.model))
    parameters = now.known_parameters

    def value() -> Tensor:
        return form([p - a for p, a in zip(parameters, anchors, strict=True)])

    own = float(history.known(now.model).detach())
    theirs = float(value().detach())
    gradients = torch.autograd.grad(value(), parameters)
    result = Result(peer, MEASURED, values=[theirs], version=adapter.version())
    factor, largest = theirs / own if own else 0.0, LARGEST_FACTORS[peer]
    if not all(bool(gradient.isfinite().all()) for gradient in gradients):
        result = dataclasses.replace(
            result, status=WRONG, message="wrong: the gradient is not finite"
        )
    elif not 1 / largest <= factor <= largest:
        result = dataclasses.replace(result, status=WRONG, message=f"wrong ×{factor:.4g}")
    return result, lambda: torch.autograd.grad(value(), parameters)
