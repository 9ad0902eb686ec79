"""Figures of merit of continual learning, computed from an accuracy matrix.

Throughout, ``matrix[i][j]`` is the accuracy (a fraction between 0 and 1) on task ``j`` after
training on task ``i``, for ``T`` tasks: a list of ``T`` rows of ``T`` numbers.
"""

from collections.abc import Sequence
from statistics import fmean

AccuracyMatrix = Sequence[Sequence[float]]


def average_accuracy(matrix: AccuracyMatrix) -> float:
    """Mean accuracy over all tasks after the last one."""
    return fmean(matrix[-1])


def forgetting(matrix: AccuracyMatrix) -> float:
    """Mean drop from the best accuracy a task ever had to its accuracy at the end.

    The definition of Chaudhry et al., "Riemannian walk for incremental learning" (2018). The
    best is taken over the moments from learning the task to just before the last task, so the
    result can be negative: learning the last task then helped the earlier ones. The mean is over
    all tasks but the last; 0 for a single task.
    """
    last = len(matrix) - 1
    drops = (max(row[j] for row in matrix[j:last]) - matrix[last][j] for j in range(last))
    return fmean(drops) if last else 0.0


def backward_transfer(matrix: AccuracyMatrix) -> float:
    """Mean change of a task's accuracy from just after learning it to the end.

    The definition of Lopez-Paz and Ranzato, "Gradient episodic memory for continual learning"
    (2017). Negative where tasks are forgotten. The mean is over all tasks but the last; 0 for a
    single task.
    """
    last = len(matrix) - 1
    return fmean(matrix[last][j] - matrix[j][j] for j in range(last)) if last else 0.0


def accuracy_on_seen_tasks(matrix: AccuracyMatrix) -> list[float]:
    """Mean accuracy over the tasks seen so far: entry ``i`` of ``matrix[i][0]`` to ``[i][i]``."""
    return [fmean(row[: position + 1]) for position, row in enumerate(matrix)]
