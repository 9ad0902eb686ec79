"""Streams in which all images are seen anew in each task: pixels permuted, or images rotated."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from benchmarks.data import ImageData
from benchmarks.scenarios.base import Example


class TransformedImages(ABC):
    """All images in every task, transformed in the same way within a task.

    Only one transformed copy of the training images exists at a time, that of the latest task asked
    for. Ten copies of MNIST would be two gigabytes.
    """

    name: str
    multi_headed = False

    def __init__(self, data: ImageData, tasks: int) -> None:
        """Keep the images.

        Args:
            data: The images.
            tasks: Number of tasks ``T``.
        """
        self.tasks = tasks
        self.shape = data.shape
        self.features = data.train_inputs.shape[1]
        self.classes = data.classes
        self._data = data
        self._targets: list[int] = data.train_labels.tolist()
        self._current_task = -1
        self._current_rows: list[Tensor] = []

    @abstractmethod
    def transform(self, inputs: Tensor, task: int) -> Tensor:
        """Images ``[M, D]`` as they look in a task."""

    def training_sets(self) -> list["TransformedTask"]:
        """The training set of every task, in the order of the tasks."""
        return [TransformedTask(self, task, self._targets) for task in range(self.tasks)]

    def joint_training_set(self) -> "AllTransformedTasks":
        """The training sets of all tasks in one, ``T · N`` examples."""
        return AllTransformedTasks(self, self._targets)

    def test_set(self, task: int) -> tuple[Tensor, Tensor]:
        """Transformed inputs ``[M, D]`` and classes ``[M]`` to test one task with."""
        return self.transform(self._data.test_inputs, task), self._data.test_labels

    def training_input(self, task: int, row: int) -> Tensor:
        """One transformed training input ``[D]``.

        The first of a later task makes a copy of all. Those of earlier tasks, which a replay buffer
        asks for in between, are transformed one by one.
        """
        if task > self._current_task:
            self._current_rows = []  # let go of the old copy before making the new one
            # Picking from a list takes a third of the time of indexing the tensor.
            self._current_rows = list(self.transform(self._data.train_inputs, task).unbind(0))
            self._current_task = task
        if task == self._current_task:
            return self._current_rows[row]
        return self.transformed_alone(task, row)

    def transformed_alone(self, task: int, row: int) -> Tensor:
        """One transformed training input ``[D]``, without making a copy of all."""
        return self.transform(self._data.train_inputs[row : row + 1], task)[0]


class PermutedImages(TransformedImages):
    """One task after another with the pixels of all images in a new order.

    The order is drawn anew for every task, the first included, and is the same for all images of
    a task. It depends on the seed and the task alone: the first tasks of a longer stream are those
    of a shorter one.
    """

    name = "permuted_mnist"

    def __init__(self, data: ImageData, tasks: int, seed: int) -> None:
        """Draw the permutations.

        Args:
            data: The images.
            tasks: Number of tasks ``T``.
            seed: Seed of the permutations; the global random state is not used.
        """
        super().__init__(data, tasks)
        generator = torch.Generator().manual_seed(seed)
        self.permutations = torch.stack(
            [torch.randperm(self.features, generator=generator) for _ in range(tasks)]
        )

    def transform(self, inputs: Tensor, task: int) -> Tensor:
        """Images ``[M, D]`` with their pixels in the order of a task."""
        return inputs.index_select(1, self.permutations[task])


class RotatedImages(TransformedImages):
    """One task after another with all images rotated by a new angle.

    Angles are drawn evenly from 0 to 180 degrees, as in Lopez-Paz and Ranzato, "Gradient episodic
    memory for continual learning" (2017). As with permutations, a longer stream begins like a
    shorter one.
    """

    name = "rotated_mnist"

    def __init__(self, data: ImageData, tasks: int, seed: int) -> None:
        """Draw the angles.

        Args:
            data: The images, which have a shape ``[channels, height, width]``.
            tasks: Number of tasks ``T``.
            seed: Seed of the angles; the global random state is not used.
        """
        super().__init__(data, tasks)
        generator = torch.Generator().manual_seed(seed)
        self.angles: list[float] = (180 * torch.rand(tasks, generator=generator)).tolist()
        self._background = data.train_inputs.min().item()

    def transform(self, inputs: Tensor, task: int) -> Tensor:
        """Images ``[M, D]`` rotated by the angle of a task, between pixels by bilinear weights."""
        from torchvision.transforms.functional import InterpolationMode, rotate

        # With any other background than zero, torchvision gets pixels on the edge wrong.
        images = inputs.view(-1, *self.shape) - self._background
        rotated: Tensor = rotate(images, self.angles[task], InterpolationMode.BILINEAR, fill=[0.0])
        return rotated.flatten(1) + self._background


@dataclass(frozen=True, eq=False)
class TransformedTask(Dataset[Example]):
    """The training set of one task; fast as long as no later task's has been read.

    Attributes:
        scenario: Owner of the images.
        task: Number of the task, from 0.
        targets: Class of every image.
    """

    scenario: TransformedImages
    task: int
    targets: Sequence[int]
    task_labels: ClassVar[None] = None

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.targets)

    def __getitem__(self, index: int) -> Example:
        """Input ``[D]`` and class of one example."""
        return self.scenario.training_input(self.task, index), self.targets[index]


class AllTransformedTasks(Dataset[Example]):
    """The training sets of all tasks in one; transforms each image when it is asked for.

    Attributes:
        targets: Class of every example ``[T · N]``, task after task.
    """

    task_labels = None

    def __init__(self, scenario: TransformedImages, targets: Sequence[int]) -> None:
        """Keep references; nothing is copied but the targets.

        Args:
            scenario: Owner of the images.
            targets: Their classes ``[N]``.
        """
        self._scenario = scenario
        self._rows = len(targets)
        self.targets = list(targets) * scenario.tasks

    def __len__(self) -> int:
        """Number of examples, ``T · N``."""
        return len(self.targets)

    def __getitem__(self, index: int) -> Example:
        """Input ``[D]`` and class of one example."""
        task, row = divmod(index, self._rows)
        return self._scenario.transformed_alone(task, row), self.targets[index]
