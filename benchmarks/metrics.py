"""Figures of merit of continual learning, computed from an accuracy matrix.

Throughout, ``matrix[i][j]`` is the accuracy (a fraction between 0 and 1) on task ``j`` after
training on task ``i``, for ``T`` tasks: a list of ``T`` rows of ``T`` numbers.
"""

from collections.abc import Sequence
from statistics import fmean

AccuracyMatrix = Sequence[Sequence[float]]


def _check_square(matrix: AccuracyMatrix) -> None:
    """Refuse anything but a non-empty square matrix."""
    lengths = [len(row) for row in matrix]
    if not lengths or any(length != len(lengths) for length in lengths):
        raise ValueError(
            f"accuracy matrix: got {len(lengths)} rows of lengths {lengths}, "
            "expected T rows of T accuracies each, with T ≥ 1"
        )


def average_accuracy(matrix: AccuracyMatrix) -> float:
    """Mean accuracy over all tasks after the last one.

    Args:
        matrix: Accuracies ``[T][T]``.

    Returns:
        The mean of the last row, a fraction between 0 and 1.
    """
    _check_square(matrix)
    return fmean(matrix[-1])


def forgetting(matrix: AccuracyMatrix) -> float:
    """Mean drop from the best accuracy a task ever had to its accuracy at the end.

    The definition of Chaudhry et al., "Riemannian walk for incremental learning" (2018). The
    best is taken over the moments from learning the task to just before the last task, so the
    result can be negative: learning the last task then helped the earlier ones.

    Args:
        matrix: Accuracies ``[T][T]``.

    Returns:
        The mean over all tasks but the last, between -1 and 1; 0 for a single task.
    """
    _check_square(matrix)
    last = len(matrix) - 1
    if last == 0:
        return 0.0
    return fmean(
        max(matrix[row][task] for row in range(task, last)) - matrix[last][task]
        for task in range(last)
    )


def backward_transfer(matrix: AccuracyMatrix) -> float:
    """Mean change of a task's accuracy from just after learning it to the end.

    The definition of Lopez-Paz and Ranzato, "Gradient episodic memory for continual learning"
    (2017). Negative where tasks are forgotten.

    Args:
        matrix: Accuracies ``[T][T]``.

    Returns:
        The mean over all tasks but the last, between -1 and 1; 0 for a single task.
    """
    _check_square(matrix)
    last = len(matrix) - 1
    if last == 0:
        return 0.0
    return fmean(matrix[last][task] - matrix[task][task] for task in range(last))


def accuracy_on_seen_tasks(matrix: AccuracyMatrix) -> list[float]:
    """Mean accuracy over the tasks seen so far, after each task.

    Args:
        matrix: Accuracies ``[T][T]``.

    Returns:
        ``T`` fractions: entry ``i`` is the mean of ``matrix[i][0]`` to ``matrix[i][i]``.
    """
    _check_square(matrix)
    return [fmean(row[: position + 1]) for position, row in enumerate(matrix)]
