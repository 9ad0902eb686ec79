"""Penalties after few tasks and after many.

Costs depend on shapes alone, so the data are noise, and training a task is a small random move.
"""

import copy
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm

from benchmarks.contenders import move
from benchmarks.speed.cases import Problem, random_batch
from rotate_ewc import EKFACPenalty

FEWEST_EXAMPLES = 4


@dataclass(frozen=True)
class History:
    """A model that has been through some tasks, and what remembers them.

    Attributes:
        problem: The model where it is now, and the batch to step on.
        first: The model where the first task left it, and that task's data.
        merged: Merged penalties by number of tasks.
        known: After the first task, the penalty of the layers that every contender knows.
        separate: A penalty with separate tasks; None where it is not measured.
        single: As many penalties of one task each.
    """

    problem: Problem
    first: Problem
    merged: dict[int, EKFACPenalty]
    known: EKFACPenalty
    separate: EKFACPenalty | None
    single: list[EKFACPenalty]


def live(problem: Problem, tasks: Collection[int], separate_tasks: int) -> History:
    """Consolidate random tasks, one after the other.

    Args:
        problem: The problem; its model is moved after each task.
        tasks: Numbers of tasks of the merged penalties.
        separate_tasks: Number of tasks to keep separate; 0 for none.

    Returns:
        Copies of the penalty after so many tasks, and the others.
    """
    merged, separate = EKFACPenalty(), EKFACPenalty(mode="separate")
    known = EKFACPenalty(include=_known_names(problem))
    kept, single, first = {}, [], problem
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for done in tqdm(range(1, 1 + max(*tasks, separate_tasks)), unit="task", disable=None):
            task = _task(problem)
            if done == 1:
                first = task
                _consolidate(known, task)
            if done <= max(tasks):
                _consolidate(merged, task)
            if done in tasks:
                kept[done] = copy.deepcopy(merged)
            if done <= separate_tasks:
                _consolidate(separate, task)
                single.append(EKFACPenalty())
                _consolidate(single[-1], task)
            move(problem.model)
    return History(problem, first, kept, known, separate if separate_tasks else None, single)


def _known_names(problem: Problem) -> list[str]:
    """Names of the parameters that every contender knows."""
    known = {id(parameter) for parameter in problem.known_parameters}
    return [name for name, one in problem.model.named_parameters() if id(one) in known]


def _task(problem: Problem) -> Problem:
    """A copy of the model, and few examples: enough to have a matrix of the same shape."""
    size = len(problem.batches[0][0])
    batch = random_batch(problem.case, max(FEWEST_EXAMPLES, size // 4))
    return Problem(problem.case, copy.deepcopy(problem.model), problem.criterion, [batch])


def _consolidate(penalty: EKFACPenalty, task: Problem) -> None:
    model: nn.Module = task.model
    penalty.consolidate(model, task.criterion, task.batches)
