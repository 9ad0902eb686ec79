"""Streams of tasks, as PyTorch data sets and as Avalanche experiences."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from benchmarks import data as data_sets
from benchmarks.configuration import Configuration
from benchmarks.data import ImageData

Example = tuple[Tensor, int]


@dataclass(frozen=True, eq=False)
class Examples(Dataset[Example]):
    """A training set whose inputs are made, or looked up, when they are asked for."""

    input_of: Callable[[int], Tensor]  # makes the input ``[D]`` of an example from its number
    targets: Sequence[int]  # class of every example
    task_labels: Sequence[int] | None = None  # of every example, where the network is told

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.targets)

    def __getitem__(self, index: int) -> Example:
        """Input ``[D]`` and class of one example."""
        return self.input_of(index), self.targets[index]


class Scenario(ABC):
    """A stream of classification tasks.

    Attributes:
        name: Names the results, such as ``"permuted_mnist"``.
        data_source: Where the images are from, such as ``"mnist"``.
        tasks: Number of tasks ``T``.
        shape: Shape of an image before it was flattened, channels first.
        features: Number of inputs ``D``, the product of the shape.
        classes: Number of outputs, of each head where there are several.
        multi_headed: Whether there is a head for every task, and the network is told the task.
    """

    name: str
    multi_headed = False

    def __init__(self, data: ImageData, tasks: int) -> None:
        """Keep the images, which are to be shared by ``tasks`` tasks."""
        self.data_source = data.source
        self.tasks = tasks
        self.shape = data.shape
        self.features = data.train_inputs.shape[1]
        self.classes = data.classes
        self._data = data

    def training_sets(self, *, jointly: bool = False) -> list[Examples]:
        """The training set of every task, in the order of the tasks, or all in one."""
        tasks = range(self.tasks)
        return [self._training_set(one) for one in ([tasks] if jointly else [[t] for t in tasks])]

    @abstractmethod
    def test_set(self, task: int) -> tuple[Tensor, Tensor]:
        """Inputs ``[M, D]`` and classes ``[M]`` to test one task with."""

    @abstractmethod
    def _training_set(self, tasks: Sequence[int]) -> Examples:
        """The training sets of one or all tasks in one, task after task."""


class TransformedImages(Scenario):
    """All images in every task, transformed in the same way within a task.

    Only one transformed copy of the training images exists at a time, that of the latest task asked
    for. Ten copies of MNIST would be two gigabytes.
    """

    def __init__(self, data: ImageData, tasks: int) -> None:
        """Keep the images, none of them transformed yet."""
        super().__init__(data, tasks)
        self._targets: list[int] = data.train_labels.tolist()
        self._current_task = -1
        self._current_rows: list[Tensor] = []

    @abstractmethod
    def transform(self, inputs: Tensor, task: int) -> Tensor:
        """Images ``[M, D]`` as they look in a task."""

    def test_set(self, task: int) -> tuple[Tensor, Tensor]:
        """Transformed inputs ``[M, D]`` and classes ``[M]`` to test one task with."""
        return self.transform(self._data.test_inputs, task), self._data.test_labels

    def _training_set(self, tasks: Sequence[int]) -> Examples:
        """The training sets of one task, or of all in any order of examples."""
        rows = len(self._targets)
        if len(tasks) == 1:
            return Examples(partial(self._training_input, tasks[0]), self._targets)
        return Examples(lambda n: self._alone(*divmod(n, rows)), self._targets * len(tasks))

    def _training_input(self, task: int, row: int) -> Tensor:
        """One transformed training input ``[D]``.

        The first of a later task makes a copy of all. Those of earlier tasks, which a replay buffer
        asks for in between, are transformed one by one.
        """
        if task > self._current_task:
            self._current_rows = []  # let go of the old copy before making the new one
            # Picking from a list takes a third of the time of indexing the tensor.
            self._current_rows = list(self.transform(self._data.train_inputs, task).unbind(0))
            self._current_task = task
        return self._current_rows[row] if task == self._current_task else self._alone(task, row)

    def _alone(self, task: int, row: int) -> Tensor:
        """One transformed training input ``[D]``, without making a copy of all."""
        return self.transform(self._data.train_inputs[row : row + 1], task)[0]


class PermutedImages(TransformedImages):
    """One task after another with the pixels of all images in a new order.

    The order is drawn for every task, the first included, and is the same for all images of a task.
    It depends on the seed and the task alone: the first tasks of a longer stream are those of a
    shorter one.
    """

    name = "permuted_mnist"

    def __init__(self, data: ImageData, tasks: int, seed: int) -> None:
        """Draw the permutations from a seed; the global random state is not used."""
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
        """Draw the angles from a seed; the global random state is not used."""
        super().__init__(data, tasks)
        generator = torch.Generator().manual_seed(seed)
        self.angles: list[float] = (180 * torch.rand(tasks, generator=generator)).tolist()
        self._background = data.train_inputs.min().item()
        self._tests: dict[int, Tensor] = {}

    def test_set(self, task: int) -> tuple[Tensor, Tensor]:
        """Rotated inputs ``[M, D]``, kept because rotating takes longer than testing; classes."""
        if task not in self._tests:
            self._tests[task] = self.transform(self._data.test_inputs, task)
        return self._tests[task], self._data.test_labels

    def transform(self, inputs: Tensor, task: int) -> Tensor:
        """Images ``[M, D]`` rotated by the angle of a task, between pixels by bilinear weights."""
        from torchvision.transforms.functional import InterpolationMode, rotate

        # With any other background than zero, torchvision gets pixels on the edge wrong.
        images = inputs.view(-1, *self.shape) - self._background
        rotated: Tensor = rotate(images, self.angles[task], InterpolationMode.BILINEAR, fill=[0.0])
        return rotated.flatten(1) + self._background


class SplitImages(Scenario):
    """The classes in their order, an equal number to each task.

    What the network is to tell depends on the kind of increment, in the terms of van de Ven and
    Tolias, "Three scenarios for continual learning" (2019):

    * ``"task"``: which class of the task, which is given; every task has its own output layer;
    * ``"domain"``: which class of the task, which is not given; all share the outputs;
    * ``"class"``: which of all classes; there is an output for each from the beginning.
    """

    def __init__(
        self, data: ImageData, tasks: int, increment: str, name: str = "split_mnist"
    ) -> None:
        """Share the classes out; ``ValueError`` if that cannot be done evenly."""
        super().__init__(data, tasks)
        if data.classes % tasks:
            raise ValueError(
                f"tasks: got {tasks}, expected a number by which {data.classes} classes can be "
                "divided"
            )
        self.name = f"{name}_{increment}"
        self.multi_headed = increment == "task"
        self._classes_per_task = data.classes // tasks
        self._all_outputs = increment == "class"
        self.classes = data.classes if self._all_outputs else self._classes_per_task
        self._rows = data.train_inputs.unbind(0)

    def test_set(self, task: int) -> tuple[Tensor, Tensor]:
        """Inputs ``[M, D]`` and labels ``[M]`` to test one task with."""
        chosen = self._rows_of(self._data.test_labels, task)
        return self._data.test_inputs[chosen], self._labels(self._data.test_labels[chosen])

    def _training_set(self, tasks: Sequence[int]) -> Examples:
        """The training sets of some tasks in one, task after task."""
        labels = self._data.train_labels
        chosen = [self._rows_of(labels, task) for task in tasks]
        told = [task for task, rows in zip(tasks, chosen, strict=True) for _ in range(len(rows))]
        rows = torch.cat(chosen)
        inputs = [self._rows[row] for row in rows.tolist()]
        targets = self._labels(labels[rows]).tolist()
        return Examples(inputs.__getitem__, targets, told if self.multi_headed else None)

    def _rows_of(self, classes: Tensor, task: int) -> Tensor:
        """Where the classes of a task are among others; ``ValueError`` if they are not."""
        rows = torch.nonzero(classes // self._classes_per_task == task).flatten()
        if not len(rows):
            raise ValueError(
                f"training_images: got so few that none of {len(classes)} images is for task "
                f"{task + 1} of {self.tasks}; expected more"
            )
        return rows

    def _labels(self, classes: Tensor) -> Tensor:
        """What the network is to answer for images of some classes."""
        return classes if self._all_outputs else classes % self._classes_per_task


def load_data(configuration: Configuration, data_root: Path) -> ImageData:
    """Load the images to be used; ``ValueError`` if a folder has no such images."""
    data = loaded(configuration.images, data_root)
    data = data.limited(configuration.training_images)
    return data.for_validation() if configuration.validate else data


@lru_cache(maxsize=1)
def loaded(folder: Path | None, data_root: Path) -> ImageData:
    """The images of a folder, or else MNIST; a call mostly asks for what the last one did."""
    return data_sets.load_images(data_root) if folder is None else data_sets.load_folder(folder)


def make_scenario(configuration: Configuration, data: ImageData, seed: int) -> Scenario:
    """Make a stream of tasks; ``ValueError`` if the classes cannot be split into so many."""
    if configuration.scenario == "permuted_mnist":
        return PermutedImages(data, configuration.tasks, seed)
    if configuration.scenario == "rotated_mnist":
        return RotatedImages(data, configuration.tasks, seed)
    source = "mnist" if configuration.images is None else data.source
    return SplitImages(data, configuration.tasks, configuration.increment, f"split_{source}")


def training_experiences(scenario: Scenario, *, jointly: bool) -> list[Any]:
    """Avalanche experiences, one per task or one for all; with task labels if multi-headed."""
    from benchmarks.avalanche_names import (
        benchmark_from_datasets,
        with_classes_timeline,
        with_task_labels,
    )

    datasets = scenario.training_sets(jointly=jointly)
    benchmark = benchmark_from_datasets(train=[_for_avalanche(dataset) for dataset in datasets])
    if scenario.multi_headed:
        benchmark = with_classes_timeline(with_task_labels(benchmark))
    return list(benchmark.train_stream)


def _for_avalanche(dataset: Examples) -> Any:
    """A data set as Avalanche's own kind; its batches have task labels if it has any.

    Learning without forgetting asks for task labels in any case.
    """
    from benchmarks.avalanche_names import DataAttribute, TaskAwareClassificationDataset

    told = dataset.task_labels is not None
    task_labels = dataset.task_labels if told else [0] * len(dataset)
    attributes = [
        DataAttribute(dataset.targets, "targets"),
        DataAttribute(task_labels, "targets_task_labels", use_in_getitem=told),
    ]
    return TaskAwareClassificationDataset([dataset], data_attributes=attributes)
