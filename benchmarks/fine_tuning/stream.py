"""One run: a stream of tasks learned by one method, and what is measured."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.fine_tuning.methods import METHODS, Method
from benchmarks.fine_tuning.protocol import TuningOptions
from benchmarks.fine_tuning.tasks import Part, Task
from benchmarks.metrics import backward_transfer
from benchmarks.speed.measuring import peak_growth

EVALUATION_BATCH = 50


@dataclass
class Outcome:
    """What a run reached; times are of the processor, not of the clock."""

    matrix: list[list[float]]  # accuracies, or losses: after each task, on all tasks so far
    strength: float | None = None
    step_seconds: float = 0.0  # mean over the steps of all tasks but the first
    task_end_seconds: float = 0.0  # mean for looking at a task when it is learned
    # By how much resident memory grew, at most, while tasks after the first were learned; with the
    # optimizer's averages.
    peak_bytes: int = 0
    torch: str = torch.__version__


# Of a model, a task, and whether on its held-out part: what a matrix has.
Measure = Callable[[Any, Task, bool], float]
# From the options of a command and a seed to the network and the tasks.
Start = Callable[[Any, int], tuple[Any, Sequence[Task]]]


@torch.no_grad()
def accuracy(model: Any, task: Task, validate: bool) -> float:
    """Accuracy of a classifier on a task's test part, or on what is held out."""
    model.head = task.head
    part = task.held_out if validate else task.test
    hits = [
        int((model(ids).argmax(1) == labels).sum())
        for ids, labels in part.batches(EVALUATION_BATCH)
    ]
    return sum(hits) / len(part)


def scores(matrix: Sequence[Sequence[float]]) -> dict[str, float]:
    """Return average accuracy after the last task, forgetting, and accuracy on new tasks."""
    last = matrix[-1]
    new = [row[-1] for row in matrix[1:]]
    return {
        "accuracy": sum(last) / len(last),
        # Since each was learned, not since it was best.
        "forgetting": -backward_transfer(matrix) if len(matrix) > 1 else 0.0,
        "new": sum(new) / len(new) if new else last[-1],
    }


def learned(
    start: Start,
    options: Any,
    name: str,
    strength: float | None,
    seed: int,
    *,
    validate: bool,
    measure: Measure = accuracy,
) -> dict[str, Any]:
    """Learn a stream of tasks with a method, and return what it reached: an :class:`Outcome`.

    Without a strength, the method finds it or has none. With ``validate``, the network is measured
    on held-out examples, and not on those of the test. Options must be hashable.
    """
    method = METHODS[name](strength, examples=options.fisher_samples, seed=seed)
    model, tasks = start(options, seed)

    def measured(seen: Sequence[Task]) -> list[float]:
        return [measure(model, task, validate) for task in seen]

    if method.at_once:
        _learn_jointly(model, tasks, options, 1000 * seed)
        return asdict(Outcome([measured(tasks)]))
    model.load_state_dict(_after_first(start, options, seed))
    outcome = Outcome([measured(tasks[:1])])
    spent = ends = 0.0
    for number, (before, task) in enumerate(pairwise(tasks), start=1):
        began = time.process_time()
        model.head = before.head
        method.end(model, before.train)
        ends += time.process_time() - began
        work = partial(learn, model, task, method, options, 1000 * seed + number)
        seconds, growth = peak_growth(work)
        spent += seconds
        outcome.peak_bytes = max(outcome.peak_bytes, growth)
        outcome.matrix.append(measured(tasks[: number + 1]))
    others = max(len(tasks) - 1, 1)
    outcome.step_seconds = spent / (others * options.steps)
    outcome.task_end_seconds = ends / others
    outcome.strength = method.found_strength()
    return asdict(outcome)


@lru_cache(maxsize=3)
def _after_first(start: Start, options: Any, seed: int) -> dict[str, Any]:
    """The state of the network after the first task, for which all methods do the same."""
    model, tasks = start(options, seed)
    learn(model, tasks[0], Method(None, examples=1, seed=0), options, 1000 * seed)
    state: dict[str, Any] = model.state_dict()
    return state


def _learn_jointly(model: Any, tasks: Sequence[Task], options: TuningOptions, seed: int) -> None:
    """Learn all tasks at once, with as many batches of each."""
    orders = [_order(task.train, options, seed + n) for n, task in enumerate(tasks)]
    optimizer = _optimizer(model, options)
    for step in range(options.steps):
        for task, order in zip(tasks, orders, strict=True):
            model.head = task.head
            _step(model, optimizer, Method(None, examples=1, seed=0), task.train.part(order[step]))


def learn(model: Any, task: Task, method: Method, options: TuningOptions, seed: int) -> float:
    """Learn one task; return the seconds of the processor."""
    model.head = task.head
    optimizer = _optimizer(model, options)
    order = _order(task.train, options, seed)
    method.begin(model, optimizer)
    start = time.process_time()
    for chosen in order:
        _step(model, optimizer, method, task.train.part(chosen))
    method.finish()
    return time.process_time() - start


def _step(model: Any, optimizer: torch.optim.Optimizer, method: Method, batch: Part) -> None:
    optimizer.zero_grad()
    loss = cross_entropy(model(batch.inputs), batch.labels)
    if (extra := method.extra_loss(model, batch.inputs)) is not None:
        loss = loss + extra
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def _optimizer(model: nn.Module, options: TuningOptions) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.Adam(trained, options.learning_rate)


def _order(data: Part, options: TuningOptions, seed: int) -> list[Tensor]:
    """Batches of places, in as many random orders of the data as it takes."""
    generator = torch.Generator().manual_seed(seed)
    wanted = options.steps * options.batch_size
    rounds = -(-wanted // len(data))
    orders = [torch.randperm(len(data), generator=generator) for _ in range(rounds)]
    return list(torch.split(torch.cat(orders)[:wanted], options.batch_size))
