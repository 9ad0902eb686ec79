"""What is timed of a penalty after few tasks and many: its value and gradient, and training steps.

Costs depend on shapes alone, so the data are noise, and training a task is a small random move.
"""

import copy
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import torch
from torch.optim import Adam
from tqdm import tqdm

from benchmarks.speed.cases import Workload
from rotate_ewc import EKFACPenalty

Work = Callable[[], object]

# So small that thousands of steps leave the network what it is: one that has learned the batch by
# heart has vanishing gradients, and processors take longer for numbers that are almost zero.
LEARNING_RATE = 1e-6
FEWEST_EXAMPLES = 4
MOVE = 0.01


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

    Args:
        workload: The model, which is moved, and the batch to step on.
        tasks: Numbers of tasks of the merged penalties.
        separate_tasks: Numbers of tasks of the penalties that keep tasks separate.
    """
    model = workload.model
    known = {id(parameter) for parameter in workload.known_parameters}
    include = [name for name, one in model.named_parameters() if id(one) in known]
    merged: dict[int, EKFACPenalty] = {}
    separate: dict[int, EKFACPenalty] = {}
    kept = (
        (tasks, EKFACPenalty(), merged),
        (separate_tasks, EKFACPenalty(mode="separate"), separate),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first = _task(workload)
        of_known = _after(first, EKFACPenalty(include=include))
        last = max([*tasks, *separate_tasks])
        for done in tqdm(range(1, 1 + last), unit="task", disable=None):
            task = first if done == 1 else _task(workload)
            for numbers, penalty, copies in kept:
                if done <= max(numbers, default=0):
                    _after(task, penalty)
                if done in numbers:
                    copies[done] = copy.deepcopy(penalty)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(MOVE * torch.randn_like(parameter))
    return History(workload, first, of_known, merged, separate)


def _task(workload: Workload) -> Workload:
    """A copy of the model, and few examples: enough to have a matrix of the same shape."""
    examples = max(FEWEST_EXAMPLES, workload.batch_size // 4)
    batches = [workload.case.random_batch(examples)]
    return replace(workload, model=copy.deepcopy(workload.model), batches=batches)


def _after(task: Workload, penalty: EKFACPenalty) -> EKFACPenalty:
    """The penalty after one task more."""
    penalty.consolidate(task.model, task.criterion, task.batches)
    return penalty


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
