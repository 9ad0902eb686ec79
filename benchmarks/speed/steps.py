"""What is timed of a penalty after few tasks and many: its value and gradient, and training steps.

Costs depend on shapes alone, so the data are noise, and training a task is a small random move.
"""

import copy
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.optim import Adam
from tqdm import tqdm

from benchmarks.speed.cases import Workload
from benchmarks.speed.names import PROXIMAL_EVERY, TANGENT_EVERY
from rotate_ewc import EKFACPenalty, RotatedAdam, TangentPenalty, step_sizes_of
from rotate_ewc.penalty.step_size import StepSizes

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
    single: list[EKFACPenalty]  # penalties of one task each, for the first tasks


def live(
    workload: Workload,
    tasks: Collection[int],
    separate_tasks: Collection[int] = (),
    single_tasks: int = 0,
) -> History:
    """Consolidate random tasks, one after the other, and move the model after each.

    Args:
        workload: The model, which is moved, and the batch to step on.
        tasks: Numbers of tasks of the merged penalties.
        separate_tasks: Numbers of tasks of the penalties that keep tasks separate.
        single_tasks: Number of penalties of one task each; no more than there are tasks.
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
        first, single = _task(workload), []
        of_known = _after(first, EKFACPenalty(include=include))
        last = max([*tasks, *separate_tasks])
        for done in tqdm(range(1, 1 + last), unit="task", disable=None):
            task = first if done == 1 else _task(workload)
            for numbers, penalty, copies in kept:
                if done <= max(numbers, default=0):
                    _after(task, penalty)
                if done in numbers:
                    copies[done] = copy.deepcopy(penalty)
            if done <= single_tasks:
                single.append(_after(task, EKFACPenalty()))
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(MOVE * torch.randn_like(parameter))
    return History(workload, first, of_known, merged, separate, single)


def _task(workload: Workload) -> Workload:
    """A copy of the model, and few examples: enough to have a matrix of the same shape."""
    examples = max(FEWEST_EXAMPLES, workload.batch_size // 4)
    batches = [workload.case.random_batch(examples)]
    return replace(workload, model=copy.deepcopy(workload.model), batches=batches)


def _after(task: Workload, penalty: EKFACPenalty) -> EKFACPenalty:
    """The penalty after one task more."""
    penalty.consolidate(task.model, task.criterion, task.batches)
    return penalty


class Learner:
    """A copy of a model with its optimizer, Adam, and a batch."""

    def __init__(self, workload: Workload) -> None:
        """Copy a workload's model."""
        self.model = copy.deepcopy(workload.model)
        self.optimizer = Adam(self.model.parameters(), lr=LEARNING_RATE)
        self._criterion = workload.criterion
        self._inputs, self._targets = workload.batches[0]

    def backward(self, penalty: EKFACPenalty | None = None) -> None:
        """Replace the gradient by that of the loss, with a penalty in it if there is one."""
        self.optimizer.zero_grad()
        loss = self._criterion(self.model(self._inputs), self._targets)
        if penalty is not None:
            loss = loss + penalty(self.model)
        loss.backward()

    def step(self, penalty: EKFACPenalty | None = None) -> None:
        """Take a whole step, with a penalty in the loss if there is one."""
        self.backward(penalty)
        self.optimizer.step()

    def sizes(self, steps: int) -> StepSizes:
        """What Adam makes of a gradient of one in so many steps."""
        return step_sizes_of(self.optimizer, self.model, steps * LEARNING_RATE)


def value_and_gradient(workload: Workload, *penalties: EKFACPenalty) -> Work:
    """A penalty, or the sum of several, forward and backward for all that is not frozen."""
    own = copy.deepcopy(workload.model)
    parameters = [parameter for parameter in own.parameters() if parameter.requires_grad]

    def work() -> tuple[Tensor, ...]:
        first, *others = penalties
        value = first(own)
        for other in others:
            value = value + other(own)
        return torch.autograd.grad(value, parameters)

    return work


def plain_step(workload: Workload, penalty: EKFACPenalty | None = None) -> Work:
    """A step of Adam, with a penalty in the loss if there is one."""
    learner = Learner(workload)
    return lambda: learner.step(penalty)


def proximal_steps(workload: Workload, penalty: EKFACPenalty) -> Work:
    """Some steps, with a proximal step after the last."""
    learner = Learner(workload)

    def work() -> None:
        for _ in range(PROXIMAL_EVERY):
            learner.step()
        penalty.proximal_step_(learner.model, learner.sizes(PROXIMAL_EVERY))

    return work


def tangent_steps(workload: Workload, penalty: EKFACPenalty) -> Work:
    """Some steps with the tangent plane's gradient, which is refreshed after the last."""
    learner, tangent = Learner(workload), TangentPenalty(penalty)

    def work() -> None:
        for _ in range(TANGENT_EVERY):
            learner.backward()
            tangent.add_gradient_(learner.model)
            learner.optimizer.step()
        tangent.refresh_(learner.model, learner.sizes(TANGENT_EVERY))

    return work


def rotated_step(workload: Workload, penalty: EKFACPenalty) -> Work:
    """A step of the optimizer that obeys the penalty itself."""
    learner = Learner(workload)
    learner.optimizer = RotatedAdam(learner.model, penalty, lr=LEARNING_RATE)  # type: ignore[assignment]
    return learner.step


def rotated_update(workload: Workload, penalty: EKFACPenalty) -> Work:
    """What the optimizer does once the gradient is there."""
    learner = Learner(workload)
    learner.backward()
    optimizer = RotatedAdam(learner.model, penalty, lr=LEARNING_RATE)
    return lambda: optimizer.step()
