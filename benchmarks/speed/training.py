"""One case of training: steps, penalties and the peers' quadratic forms, within one process.

Costs depend on shapes alone, so the data are noise, and training a task is a small random move.
Besides, what takes time outside training: loading a snapshot, and importing the package.
"""

import copy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Adam
from tqdm import tqdm

from benchmarks.command import versions
from benchmarks.peers.verdict import in_one_line
from benchmarks.speed import names
from benchmarks.speed.cases import Workload, build, build_step
from benchmarks.speed.contenders import BY_NAME
from benchmarks.speed.measuring import WARM_UPS, time_in_rounds
from benchmarks.speed.penalty_command import Options
from benchmarks.speed.results import (
    MEASURED,
    MISSING,
    REFUSED,
    WRONG,
    Duration,
    Result,
    Training,
)
from rotate_ewc import EKFACLinearOperator, EKFACPenalty

Work = Callable[[], object]

# So small that thousands of steps leave the network what it is: one that has learned the batch by
# heart has vanishing gradients, and processors take longer for numbers that are almost zero.
LEARNING_RATE = 1e-6
FEWEST_EXAMPLES = 4
MOVE = 0.01
# Nngeometry takes weight and bias in one block, and has other sampled labels.
LARGEST_FACTORS = {names.NNGEOMETRY: 10.0, names.CURVLINOPS: 1.01}
# Steps of networks with many products are long enough to need few of them.
REPETITIONS = {names.TINY_MLP: 20, names.SMALL_MLP: 20}
FEW_REPETITIONS = 3
STEPS_PER_CALL = {names.TANGENT: names.TANGENT_EVERY}
SNAPSHOT_EXAMPLES = 64
PROCESSES = 5  # that import the package
IMPORTS = """\
from time import perf_counter
start = perf_counter()
import torch
middle = perf_counter()
import rotate_ewc
print(middle - start, perf_counter() - middle)
"""


@dataclass(frozen=True)
class History:
    """A model that has been through some tasks, and what remembers them."""

    workload: Workload  # the model where it is now, and the batch to step on
    first: Workload  # the model where the first task left it, and that task's data
    known: EKFACPenalty  # of the layers that every contender knows, after the first task
    merged: dict[int, EKFACPenalty]  # merged penalties by number of tasks
    separate: dict[int, EKFACPenalty]  # penalties that keep tasks separate, by number of tasks


def live(
    workload: Workload, tasks: Collection[int], separate_tasks: Collection[int] = ()
) -> History:
    """Consolidate random tasks, one after the other, and move the model after each.

    Penalties are kept after these numbers of tasks: merged ones, and ones with separate tasks.
    """
    model = workload.model
    known = {id(parameter) for parameter in workload.known_parameters}
    include = [name for name, one in model.named_parameters() if id(one) in known]
    merged: dict[int, EKFACPenalty] = {}
    separate: dict[int, EKFACPenalty] = {}
    kept = (
        (tasks, EKFACPenalty(1.0), merged),
        (separate_tasks, EKFACPenalty(1.0, mode="separate"), separate),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first = _task(workload)
        of_known = EKFACPenalty(1.0, include=include)
        of_known.consolidate(first.model, first.criterion, first.batches)
        last = max([*tasks, *separate_tasks])
        for done in tqdm(range(1, 1 + last), unit="task", disable=None):
            task = first if done == 1 else _task(workload)
            for numbers, penalty, copies in kept:
                if done <= max(numbers, default=0):
                    penalty.consolidate(task.model, task.criterion, task.batches)
                if done in numbers:
                    copies[done] = copy.deepcopy(penalty)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(MOVE * torch.randn_like(parameter))
    return History(workload, first, of_known, merged, separate)


def _task(workload: Workload) -> Workload:
    """A copy of the model, and few examples: enough to have a matrix of the same shape."""
    examples = max(FEWEST_EXAMPLES, workload.batch_size // 4)
    return replace(_copied(workload), batches=[workload.case.random_batch(examples)])


def value_and_gradient(workload: Workload, penalty: EKFACPenalty) -> Work:
    """A penalty, forward and backward for all that is not frozen."""
    own = copy.deepcopy(workload.model)
    parameters = [parameter for parameter in own.parameters() if parameter.requires_grad]
    return lambda: torch.autograd.grad(penalty(own), parameters)


def training_steps(
    workload: Workload, penalty: EKFACPenalty | None = None, update: str = "loss", every: int = 1
) -> Work:
    """So many steps of Adam on a copy of a model.

    Args:
        workload: The model and the batch.
        penalty: A penalty, if there is one.
        update: `"loss"`, or how the penalty is attached to the optimizer.
        every: How many steps, after which a tangent plane is renewed.
    """
    model = copy.deepcopy(workload.model)
    optimizer = Adam(model.parameters(), lr=LEARNING_RATE)
    inputs, targets = workload.batches[0]
    in_loss = penalty if update == "loss" else None
    if penalty is not None and in_loss is None:
        penalty.attach(optimizer, model, update, every)

    def work() -> None:
        for _ in range(every):
            optimizer.zero_grad()
            loss = workload.criterion(model(inputs), targets)
            if in_loss is not None:
                loss = loss + in_loss(model)
            loss.backward()
            optimizer.step()

    return work


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
        names.STEP: training_steps(workload),
        names.ATTACHED: training_steps(workload, given, "rotated"),
        names.FINDING: training_steps(workload, last, "rotated"),
        names.GRADIENT: training_steps(workload, given, "gradient"),
        names.TANGENT: training_steps(workload, given, "tangent", names.TANGENT_EVERY),
    }
    for tasks, penalty in merged.items():
        name = names.after(names.STEP_WITH_PENALTY, tasks)
        works[name] = training_steps(workload, penalty)
    for tasks, penalty in merged.items():
        works[names.after(names.PENALTY, tasks)] = value_and_gradient(workload, penalty)
    ours = names.ours_beside_peers(case)
    if ours not in works:
        known = _copied(workload)
        known.freeze_other_parameters()
        works[ours] = value_and_gradient(known, history.known)
    own = float(history.known(workload.model).detach())
    results = {peer: _enter_peer(peer, own, history, works) for peer in names.PEERS}
    results[ours] = Result(ours, MEASURED, values=[own])
    for tasks, penalty in history.separate.items():
        name = names.after(names.SEPARATE, tasks)
        works[name] = value_and_gradient(workload, penalty)
    return works, results


def _copied(workload: Workload) -> Workload:
    """The same data, and a copy of the model."""
    return replace(workload, model=copy.deepcopy(workload.model))


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
        result.status, result.message = REFUSED, in_one_line(error)
        return result
    works[peer] = lambda: torch.autograd.grad(value(), parameters)
    result.status, result.values = MEASURED, [float(theirs.detach())]
    factor, largest = result.values[0] / own if own else 0.0, LARGEST_FACTORS[peer]
    if not all(bool(gradient.isfinite().all()) for gradient in gradients):
        result.status, result.message = WRONG, "wrong: the gradient is not finite"
    elif not 1 / largest <= factor <= largest:
        result.status, result.message = WRONG, f"wrong ×{factor:.4g}"
    return result


def time_loading(rounds: int, *, quick: bool = False) -> Duration:
    """Load a snapshot, and decompose its largest factor: loading never does that."""
    workload = build(names.LARGE_MLP, quick=quick).beginning(SNAPSHOT_EXAMPLES)
    operator = EKFACLinearOperator(
        workload.model,
        workload.criterion,
        workload.trained_parameters,
        workload.batches,
        check_deterministic=False,
    )
    size = max(max(block.eigenvalues.shape) for block in operator.blocks)
    noise = torch.randn(2 * size, size).relu()
    factor = noise.T @ noise / len(noise)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "snapshot.safetensors"
        operator.save(path)
        works = (lambda: EKFACLinearOperator.load(path), lambda: torch.linalg.eigh(factor))
        repetitions = 1 if quick else FEW_REPETITIONS
        seconds = time_in_rounds(dict(enumerate(works)), rounds=rounds, repetitions=repetitions)
    label = f"loading a snapshot of {names.CASES[names.LARGE_MLP]}"
    return Duration(label, seconds[0], f"one eigh of {size} × {size}", seconds[1])


def time_imports(*, quick: bool = False) -> Duration:
    """Import PyTorch and then this package, in fresh processes; only once if that is quick."""
    command = [sys.executable, "-c", IMPORTS]
    pairs = []
    for _ in range(1 if quick else PROCESSES):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        pairs.append([float(word) for word in done.stdout.split()])
    others, ours = map(list, zip(*pairs, strict=True))
    return Duration("importing rotate_ewc", ours, "importing torch before", others)
