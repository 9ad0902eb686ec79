"""Data, models and a training run that the tests of the Avalanche integration share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from avalanche.benchmarks import benchmark_from_datasets, nc_benchmark
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.models import IncrementalClassifier, MultiHeadClassifier, MultiTaskModule
from avalanche.training.plugins import LRSchedulerPlugin
from avalanche.training.supervised import Naive
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import TensorDataset

CE = nn.CrossEntropyLoss()
TASKS, EPOCHS = 3, 2

MakeOptimizer = Callable[[nn.Module], Optimizer]


def dataset(seed: int, n: int = 24, classes: int = 4) -> TensorDataset:
    """Separable data, ordered by class."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(n) * classes // n
    centres = 2 * torch.randn(classes, 6, generator=generator)
    data = TensorDataset(centres[targets] + torch.randn(n, 6, generator=generator), targets)
    data.targets = targets.tolist()
    return data


def domain_benchmark(tasks: int = 3) -> Any:
    """Plain datasets, without task labels: batches are pairs."""
    streams = [as_classification_dataset(dataset(seed)) for seed in range(tasks)]
    return benchmark_from_datasets(train=streams, test=streams)


def class_benchmark(task_labels: bool) -> Any:
    data = dataset(0, 48)
    return nc_benchmark(
        data, data, n_experiences=2, task_labels=task_labels, seed=0, shuffle=False,
        class_ids_from_zero_in_each_exp=task_labels,
    )  # fmt: skip


def net(dropout: float = 0.5) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 4))


class Incremental(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(nn.Linear(6, 8), nn.ReLU())
        self.classifier = IncrementalClassifier(8, initial_out_features=1, masking=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))


class MultiHead(MultiTaskModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(nn.Linear(6, 8), nn.ReLU())
        self.classifier = MultiHeadClassifier(8)

    def forward(self, x: Tensor, task_labels: Tensor) -> Tensor:
        return self.classifier(self.features(x), task_labels)


def sgd(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), lr=0.05, momentum=0.8)


def trained(
    plugins: list[Any], make_optimizer: MakeOptimizer = sgd, schedule: float | None = None
) -> nn.Module:
    """The model after all tasks in Avalanche's loop; three batches make an epoch."""
    model = net(dropout=0.0)
    optimizer = make_optimizer(model)
    if schedule is not None:
        scheduler = LRSchedulerPlugin(ExponentialLR(optimizer, schedule))
        plugins = [scheduler, *plugins]
    strategy = Naive(
        model=model, optimizer=optimizer, criterion=CE, train_mb_size=8, train_epochs=EPOCHS,
        plugins=plugins, evaluator=None,
    )  # fmt: skip
    for experience in domain_benchmark(TASKS).train_stream:
        strategy.train(experience, shuffle=False)
    return model


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])
