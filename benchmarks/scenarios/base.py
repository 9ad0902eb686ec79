"""What a stream of tasks is, and how Avalanche gets to see it.

A scenario is anything with the members of :class:`Scenario`; a run needs to know no more.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

Example = tuple[Tensor, int]


class LabelledDataset(Protocol):
    """What Avalanche needs of a data set for classification."""

    @property
    def targets(self) -> Sequence[int]:
        """Class of every example."""

    @property
    def task_labels(self) -> Sequence[int] | None:
        """Task of every example, where the network is told; else None."""

    def __len__(self) -> int:
        """Number of examples."""

    def __getitem__(self, index: int) -> Example:
        """Input ``[D]`` and class of one example."""


class Scenario(Protocol):
    """A stream of classification tasks.

    Attributes:
        name: Names the results, such as ``"permuted_mnist"``.
        tasks: Number of tasks ``T``.
        shape: Shape of an image before it was flattened, channels first.
        features: Number of inputs ``D``, the product of the shape.
        classes: Number of outputs, of each head where there are several.
        multi_headed: Whether there is a head for every task, and the network is told the task.
    """

    name: str
    tasks: int
    shape: tuple[int, ...]
    features: int
    classes: int
    multi_headed: bool

    def training_sets(self) -> Sequence[LabelledDataset]:
        """The training set of every task, in the order of the tasks."""

    def joint_training_set(self) -> LabelledDataset:
        """The training sets of all tasks in one."""

    def test_set(self, task: int) -> tuple[Tensor, Tensor]:
        """Inputs ``[M, D]`` and classes ``[M]`` to test one task with."""


def training_experiences(scenario: Scenario, *, jointly: bool) -> list[Any]:
    """Make Avalanche experiences of a scenario's training sets.

    Args:
        scenario: The tasks.
        jointly: Whether to put all tasks into one experience.

    Returns:
        One experience per task, or one altogether. Their batches are pairs (inputs, classes), or
        triples with task labels where the scenario has a head for every task.
    """
    from benchmarks.avalanche_names import (
        benchmark_from_datasets,
        with_classes_timeline,
        with_task_labels,
    )

    datasets = [scenario.joint_training_set()] if jointly else scenario.training_sets()
    benchmark = benchmark_from_datasets(train=[_for_avalanche(dataset) for dataset in datasets])
    if scenario.multi_headed:
        benchmark = with_classes_timeline(with_task_labels(benchmark))
    return list(benchmark.train_stream)


def _for_avalanche(dataset: LabelledDataset) -> Any:
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
