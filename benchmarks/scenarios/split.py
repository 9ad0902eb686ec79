"""Streams in which each task has classes of its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from benchmarks.data import ImageData
from benchmarks.scenarios.base import Example

Increment = Literal["task", "domain", "class"]
INCREMENTS: tuple[Increment, ...] = ("task", "domain", "class")


class SplitImages:
    """The classes in their order, an equal number to each task.

    What the network is to tell depends on the kind of increment, in the terms of van de Ven and
    Tolias, "Three scenarios for continual learning" (2019):

    * ``"task"``: which class of the task, which is given; every task has its own output layer;
    * ``"domain"``: which class of the task, which is not given; all share the outputs;
    * ``"class"``: which of all classes; there is an output for each from the beginning.
    """

    def __init__(
        self, data: ImageData, tasks: int, increment: Increment, name: str = "split_mnist"
    ) -> None:
        """Share the classes out.

        Args:
            data: The images.
            tasks: Number of tasks ``T``, which divides the number of classes.
            increment: What the network is to tell.
            name: Names the results, with the increment.

        Raises:
            ValueError: If the classes cannot be shared out evenly.
        """
        if data.classes % tasks:
            raise ValueError(
                f"tasks: got {tasks}, expected a number by which {data.classes} classes can be "
                "divided"
            )
        self.name = f"{name}_{increment}"
        self.tasks = tasks
        self.shape = data.shape
        self.features = data.train_inputs.shape[1]
        self.multi_headed = increment == "task"
        self._classes_per_task = data.classes // tasks
        self.classes = data.classes if increment == "class" else self._classes_per_task
        self._increment = increment
        self._data = data
        self._rows = data.train_inputs.unbind(0)

    def training_sets(self) -> list["SplitTask"]:
        """The training set of every task, in the order of the tasks."""
        return [self._training_set([task]) for task in range(self.tasks)]

    def joint_training_set(self) -> "SplitTask":
        """The training sets of all tasks in one."""
        return self._training_set(range(self.tasks))

    def test_set(self, task: int) -> tuple[Tensor, Tensor]:
        """Inputs ``[M, D]`` and labels ``[M]`` to test one task with."""
        chosen = self._rows_of(self._data.test_labels, task)
        return self._data.test_inputs[chosen], self._labels(self._data.test_labels[chosen])

    def _training_set(self, tasks: Sequence[int]) -> "SplitTask":
        """The training sets of some tasks in one, task after task."""
        labels = self._data.train_labels
        chosen = [self._rows_of(labels, task) for task in tasks]
        task_labels = [
            task for task, rows in zip(tasks, chosen, strict=True) for _ in range(len(rows))
        ]
        rows = torch.cat(chosen)
        return SplitTask(
            inputs=[self._rows[row] for row in rows.tolist()],
            targets=self._labels(labels[rows]).tolist(),
            task_labels=task_labels if self.multi_headed else None,
        )

    def _rows_of(self, classes: Tensor, task: int) -> Tensor:
        """Where the classes of a task are among others.

        Raises:
            ValueError: If they are not.
        """
        rows = torch.nonzero(classes // self._classes_per_task == task).flatten()
        if not len(rows):
            raise ValueError(
                f"training_images: got so few that none of {len(classes)} images is for task "
                f"{task + 1} of {self.tasks}; expected more"
            )
        return rows

    def _labels(self, classes: Tensor) -> Tensor:
        """What the network is to answer for images of some classes."""
        return classes if self._increment == "class" else classes % self._classes_per_task


@dataclass(frozen=True, eq=False)
class SplitTask(Dataset[Example]):
    """A training set of images that are picked from those of all tasks.

    Attributes:
        inputs: The images, ``[D]`` each.
        targets: What the network is to answer for each.
        task_labels: Task of each, where the network is told; else None.
    """

    inputs: Sequence[Tensor]
    targets: Sequence[int]
    task_labels: Sequence[int] | None

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.inputs)

    def __getitem__(self, index: int) -> Example:
        """Input ``[D]`` and label of one example."""
        return self.inputs[index], self.targets[index]
