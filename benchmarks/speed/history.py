"""Penalties after few tasks and after many.

Costs depend on shapes alone, so the data are noise, and training a task is a small random move.
"""

import copy
from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import nn
from tqdm import tqdm

from benchmarks.speed.cases import Workload
from rotate_ewc import EKFACPenalty

FEWEST_EXAMPLES = 4
MOVE = 0.01


@dataclass(frozen=True)
class History:
    """A model that has been through some tasks, and what remembers them."""

    workload: Workload  # the model where it is now, and the batch to step on
    first: Workload  # the model where the first task left it, and that task's data
    # After the first task, the penalty of the layers that every contender knows.
    known: EKFACPenalty
    merged: dict[int, EKFACPenalty]  # merged penalties by number of tasks
    separate: dict[int, EKFACPenalty]  # penalties that keep tasks separate, by number of tasks
    single: list[EKFACPenalty]  # penalties of one task each, for the first tasks


def live(
    workload: Workload,
    tasks: Collection[int],
    separate_tasks: Collection[int] = (),
    single_tasks: int = 0,
) -> History:
    """Consolidate random tasks, one after the other."""
    merged, separate = EKFACPenalty(), EKFACPenalty(mode="separate")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first = _task(workload)
        known = _after(first, EKFACPenalty(include=_known_names(workload)))
        history = History(workload, first, known, {}, {}, [])
        last, last_separate = max(tasks), max(separate_tasks, default=0)
        for done in tqdm(range(1, 1 + max(last, last_separate)), unit="task", disable=None):
            task = first if done == 1 else _task(workload)
            if done <= last:
                _after(task, merged)
            if done in tasks:
                history.merged[done] = copy.deepcopy(merged)
            if done <= last_separate:
                _after(task, separate)
            if done <= single_tasks:
                history.single.append(_after(task, EKFACPenalty()))
            if done in separate_tasks:
                history.separate[done] = copy.deepcopy(separate)
            move(workload.model)
    return history


@torch.no_grad()
def move(model: nn.Module) -> None:
    """Change all parameters a little."""
    for parameter in model.parameters():
        parameter.add_(MOVE * torch.randn_like(parameter))


def _known_names(workload: Workload) -> list[str]:
    """Names of the parameters that every contender knows."""
    known = {id(parameter) for parameter in workload.known_parameters}
    return [name for name, one in workload.model.named_parameters() if id(one) in known]


def _task(workload: Workload) -> Workload:
    """A copy of the model, and few examples: enough to have a matrix of the same shape."""
    examples = max(FEWEST_EXAMPLES, workload.batch_size // 4)
    batches = [workload.case.random_batch(examples)]
    return replace(workload, model=copy.deepcopy(workload.model), batches=batches)


def _after(task: Workload, penalty: EKFACPenalty) -> EKFACPenalty:
    """The penalty after one task more."""
    penalty.consolidate(task.model, task.criterion, task.batches)
    return penalty
