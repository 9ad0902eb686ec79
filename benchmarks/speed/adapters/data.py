"""Data for packages that want a ``DataLoader``, without the time of collating single examples."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.speed.cases import Problem


class InMemory(Dataset[Any]):
    """Tensors of which whole batches are taken at once."""

    def __init__(self, *tensors: Tensor) -> None:
        """Keep tensors whose first axis is that of the examples."""
        self.tensors = tensors

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        """One example."""
        return tuple(tensor[index] for tensor in self.tensors)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, ...]:
        """A batch; a ``DataLoader`` calls this where it is there."""
        return tuple(tensor[list(indices)] for tensor in self.tensors)

    @staticmethod
    def collate_fn(batch: Any) -> Any:
        """What is a batch already stays as it is."""
        return batch


def in_memory(problem: Problem) -> InMemory:
    """All examples of a problem."""
    inputs, targets = zip(*problem.batches, strict=True)
    return InMemory(torch.cat(inputs), torch.cat(targets))


def loader(problem: Problem) -> DataLoader[Any]:
    """The problem's batches, in their order."""
    dataset = in_memory(problem)
    size = len(problem.batches[0][0])
    return DataLoader(dataset, batch_size=size, collate_fn=dataset.collate_fn)
