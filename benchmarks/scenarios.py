"""Streams of tasks, as PyTorch data sets and as Avalanche experiences.

A scenario is anything with the members of :class:`Scenario`; a run needs to know no more.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from benchmarks.data import ImageData

Example = tuple[Tensor, int]


class LabelledDataset(Protocol):
    """What Avalanche needs of a data set for classification."""

    @property
    def targets(self) -> Sequence[int]:
        """Class of every example."""

    def __len__(self) -> int:
        """Number of examples."""

    def __getitem__(self, index: int) -> Example:
        """Input ``[D]`` and class of one example."""


class Scenario(Protocol):
    """A stream of classification tasks.

    Attributes:
        name: Names the results, such as ``"permuted_mnist"``.
        tasks: Number of tasks ``T``.
        features: Number of inputs ``D``.
        classes: Number of outputs.
    """

    name: str
    tasks: int
    features: int
    classes: int

    def training_sets(self) -> Sequence[LabelledDataset]:
        """The training set of every task, in the order of the tasks."""

    def joint_training_set(self) -> LabelledDataset:
        """The training sets of all tasks in one."""

    def test_set(self, task: int) -> tuple[Tensor, Tensor]:
        """Inputs ``[M, D]`` and classes ``[M]`` to test one task with."""


class PermutedImages:
    """One task after another with the pixels of all images in a new order.

    The order is drawn anew for every task, the first included, and is the same for all images of
    a task. It depends on the seed and the task alone: the first tasks of a longer stream are those
    of a shorter one.

    Only one permuted copy of the training images exists at a time, that of the task last
    asked for. Ten copies of MNIST would be two gigabytes.
    """

    name = "permuted_mnist"

    def __init__(self, data: ImageData, tasks: int, seed: int) -> None:
        """Draw the permutations.

        Args:
            data: The images.
            tasks: Number of tasks ``T``.
            seed: Seed of the permutations; the global random state is not used.
        """
        self.tasks = tasks
        self.features = data.train_inputs.shape[1]
        self.classes = data.classes
        self._data = data
        self._targets: list[int] = data.train_labels.tolist()
        generator = torch.Generator().manual_seed(seed)
        self.permutations = torch.stack(
            [torch.randperm(self.features, generator=generator) for _ in range(tasks)]
        )
        self._current_task: int | None = None
        self._current_rows: list[Tensor] = []

    def training_sets(self) -> list["PermutedTask"]:
        """The training set of every task, in the order of the tasks."""
        return [PermutedTask(self, task, self._targets) for task in range(self.tasks)]

    def joint_training_set(self) -> "AllPermutedTasks":
        """The training sets of all tasks in one, ``T · N`` examples."""
        return AllPermutedTasks(self._data.train_inputs, self._targets, self.permutations)

    def test_set(self, task: int) -> tuple[Tensor, Tensor]:
        """Permuted inputs ``[M, D]`` and classes ``[M]`` to test one task with."""
        inputs = self._data.test_inputs.index_select(1, self.permutations[task])
        return inputs, self._data.test_labels

    def training_rows(self, task: int) -> list[Tensor]:
        """Permuted training inputs, ``N`` rows ``[D]``, in place of those of any other task."""
        if self._current_task != task:
            self._current_rows = []  # let go of the old copy before making the new one
            permuted = self._data.train_inputs.index_select(1, self.permutations[task])
            # Picking from a list takes a third of the time of indexing the tensor.
            self._current_rows = list(permuted.unbind(0))
            self._current_task = task
        return self._current_rows


@dataclass(frozen=True, eq=False)
class PermutedTask(Dataset[Example]):
    """The training set of one task; fast as long as no other task's is read in between.

    Attributes:
        scenario: Owner of the images.
        task: Number of the task, from 0.
        targets: Class of every image.
    """

    scenario: PermutedImages
    task: int
    targets: Sequence[int]

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.targets)

    def __getitem__(self, index: int) -> Example:
        """Input ``[D]`` and class of one example."""
        return self.scenario.training_rows(self.task)[index], self.targets[index]


class AllPermutedTasks(Dataset[Example]):
    """The training sets of all tasks in one; permutes each image when it is asked for.

    Attributes:
        targets: Class of every example ``[T · N]``, task after task.
    """

    def __init__(self, inputs: Tensor, targets: list[int], permutations: Tensor) -> None:
        """Keep references; nothing is copied but the targets.

        Args:
            inputs: Images ``[N, D]`` before permutation.
            targets: Their classes ``[N]``.
            permutations: Order of the pixels in each task ``[T, D]``.
        """
        self._rows = list(inputs.unbind(0))
        self._permutations = list(permutations.unbind(0))
        self.targets = targets * len(self._permutations)

    def __len__(self) -> int:
        """Number of examples, ``T · N``."""
        return len(self.targets)

    def __getitem__(self, index: int) -> Example:
        """Input ``[D]`` and class of one example."""
        task, row = divmod(index, len(self._rows))
        permuted = self._rows[row].index_select(0, self._permutations[task])
        return permuted, self.targets[index]


def training_experiences(scenario: Scenario, *, jointly: bool) -> list[Any]:
    """Make Avalanche experiences of a scenario's training sets.

    Args:
        scenario: The tasks.
        jointly: Whether to put all tasks into one experience.

    Returns:
        One experience per task, or one altogether. Their batches are pairs (inputs, classes),
        without task labels.
    """
    from benchmarks.avalanche_names import as_classification_dataset, benchmark_from_datasets

    datasets = [scenario.joint_training_set()] if jointly else scenario.training_sets()
    benchmark = benchmark_from_datasets(train=[as_classification_dataset(one) for one in datasets])
    return list(benchmark.train_stream)
