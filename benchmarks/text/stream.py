"""One run: a stream of tasks learned by one method, and what is measured."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.metrics import backward_transfer
from benchmarks.speed.machine import peak_growth
from benchmarks.text.methods import METHODS, Method
from benchmarks.text.tasks import Part, Task

EVALUATION_BATCH = 50


@dataclass(frozen=True, kw_only=True)
class Training:
    """How every task is learned."""

    steps: int
    batch_size: int
    learning_rate: float

    @classmethod
    def of(cls, options: Any) -> "Training":
        """Return what the options of a command say of it."""
        return cls(
            steps=options.steps,
            batch_size=options.batch_size,
            learning_rate=options.learning_rate,
        )


@dataclass
class Outcome:
    """What a run reached; times are of the processor, not of the clock.

    Attributes:
        matrix: Accuracies, or losses: after each task, on all tasks so far.
        step_seconds: Mean over the steps of all tasks but the first.
        task_end_seconds: Mean for looking at a task when it is learned.
        peak_bytes: By how much resident memory grew, at most, while tasks after the first were
            learned; with the optimizer's averages.
    """

    matrix: list[list[float]] = field(default_factory=list)
    strength: float | None = None
    step_seconds: float = 0.0
    task_end_seconds: float = 0.0
    peak_bytes: int = 0


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
) -> Outcome:
    """Learn a stream of tasks with a method, and return what it reached.

    Args:
        start: Makes the network and the tasks.
        options: Those of the command, which can be hashed.
        name: The method's.
        strength: None for what the method finds, or where it has none.
        seed: Of the run.
        validate: Whether it is measured on held-out texts, and not on those of the test.
        measure: What is measured of the network, on each task.
    """
    method = METHODS[name](strength, examples=options.fisher_samples, seed=seed)
    training = Training.of(options)
    model, tasks = start(options, seed)
    rest: Any = {"validate": validate, "measure": measure}
    if method.at_once:
        return learn_jointly(model, tasks, training, 1000 * seed, **rest)
    model.load_state_dict(_after_first(start, options, seed))
    return learn_others(model, tasks, method, training, 1000 * seed, **rest)


@lru_cache(maxsize=3)
def _after_first(start: Start, options: Any, seed: int) -> dict[str, Any]:
    """The state of the network after the first task, for which all methods do the same."""
    model, tasks = start(options, seed)
    method = Method(None, examples=1, seed=0)
    learn(model, tasks[0], method, Training.of(options), 1000 * seed)
    state: dict[str, Any] = model.state_dict()
    return state


def learn_others(
    model: Any,
    tasks: Sequence[Task],
    method: Method,
    training: Training,
    seed: int,
    *,
    validate: bool,
    measure: Measure = accuracy,
) -> Outcome:
    """Learn all tasks but the first, which the model knows already."""
    outcome = Outcome(matrix=[[measure(model, tasks[0], validate)]])
    spent = ends = 0.0
    for number, task in enumerate(tasks[1:], start=1):
        start = time.process_time()
        before = tasks[number - 1]
        model.head = before.head
        method.end(model, before.train)
        ends += time.process_time() - start
        work = partial(learn, model, task, method, training, seed + number)
        seconds, growth = peak_growth(work)
        spent += seconds
        outcome.peak_bytes = max(outcome.peak_bytes, growth)
        outcome.matrix.append([measure(model, t, validate) for t in tasks[: number + 1]])
    others = max(len(tasks) - 1, 1)
    outcome.step_seconds = spent / (others * training.steps)
    outcome.task_end_seconds = ends / others
    outcome.strength = method.found_strength()
    return outcome


def learn_jointly(
    model: Any,
    tasks: Sequence[Task],
    training: Training,
    seed: int,
    *,
    validate: bool,
    measure: Measure = accuracy,
) -> Outcome:
    """Learn all tasks at once, with as many batches of each."""
    orders = [_order(task.train, training, seed + n) for n, task in enumerate(tasks)]
    optimizer = _optimizer(model, training)
    for step in range(training.steps):
        for task, order in zip(tasks, orders, strict=True):
            model.head = task.head
            _step(model, optimizer, Method(None, examples=1, seed=0), task.train.part(order[step]))
    return Outcome(matrix=[[measure(model, task, validate) for task in tasks]])


def learn(model: Any, task: Task, method: Method, training: Training, seed: int) -> float:
    """Learn one task; return the seconds of the processor."""
    model.head = task.head
    optimizer = _optimizer(model, training)
    order = _order(task.train, training, seed)
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


def _optimizer(model: nn.Module, training: Training) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.Adam(trained, training.learning_rate)


def _order(data: Part, training: Training, seed: int) -> list[Tensor]:
    """Batches of places, in as many random orders of the data as it takes."""
    generator = torch.Generator().manual_seed(seed)
    wanted = training.steps * training.batch_size
    rounds = -(-wanted // len(data))
    orders = [torch.randperm(len(data), generator=generator) for _ in range(rounds)]
    return list(torch.split(torch.cat(orders)[:wanted], training.batch_size))
