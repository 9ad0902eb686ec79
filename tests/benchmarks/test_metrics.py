"""Metrics against numbers worked out by hand."""

import pytest

from benchmarks.metrics import (
    accuracy_on_seen_tasks,
    average_accuracy,
    backward_transfer,
    forgetting,
)

# Task 0 is at its best after task 1, not just after it was learned: forgetting and backward
# transfer then differ in more than the sign.
THREE_TASKS = [
    [0.8, 0.1, 0.2],
    [0.9, 0.7, 0.1],
    [0.5, 0.6, 1.0],
]


def test_average_accuracy_is_the_mean_of_the_last_row() -> None:
    assert average_accuracy(THREE_TASKS) == pytest.approx((0.5 + 0.6 + 1.0) / 3)


def test_forgetting_is_the_drop_from_the_best() -> None:
    assert forgetting(THREE_TASKS) == pytest.approx(((0.9 - 0.5) + (0.7 - 0.6)) / 2)


def test_backward_transfer_is_the_change_since_learning() -> None:
    assert backward_transfer(THREE_TASKS) == pytest.approx(((0.5 - 0.8) + (0.6 - 0.7)) / 2)


def test_forgetting_ignores_accuracy_before_learning_and_at_the_end() -> None:
    before_and_after = [[0.5, 0.99, 0.0], [0.5, 0.4, 0.0], [0.7, 0.6, 0.0]]
    # Task 1 was at 0.99 before it was learned; both tasks are best at the very end.
    assert forgetting(before_and_after) == pytest.approx(((0.5 - 0.7) + (0.4 - 0.6)) / 2)


def test_one_task_is_not_forgotten() -> None:
    assert average_accuracy([[0.75]]) == 0.75
    assert forgetting([[0.75]]) == 0.0
    assert backward_transfer([[0.75]]) == 0.0


def test_accuracy_on_seen_tasks_leaves_out_later_ones() -> None:
    expected = [0.8, (0.9 + 0.7) / 2, (0.5 + 0.6 + 1.0) / 3]
    assert accuracy_on_seen_tasks(THREE_TASKS) == pytest.approx(expected)
