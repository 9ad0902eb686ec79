"""Networks, records and small stand-ins that several tests of the benchmarks need."""

import re
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from benchmarks.__main__ import main
from benchmarks.avalanche_names import MultiTaskModule
from benchmarks.results import Record

DOUBLE = torch.float64


class Rows(Dataset[tuple[Tensor, ...]]):
    """Inputs, classes and, where there are any, task labels; like a data set of Avalanche's."""

    def __init__(self, inputs: Tensor, task_labels: Tensor | None = None) -> None:
        classes = torch.zeros(len(inputs), dtype=torch.long)
        self._columns = (inputs, classes) if task_labels is None else (inputs, classes, task_labels)

    def __len__(self) -> int:
        return len(self._columns[0])

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return tuple(column[index] for column in self._columns)

    def eval(self) -> "Rows":
        return self


def fake_strategy(
    model: nn.Module, inputs: Tensor, task_labels: Tensor | None = None
) -> SimpleNamespace:
    """The parts of a strategy that the baselines look at."""
    return SimpleNamespace(
        model=model,
        experience=SimpleNamespace(dataset=Rows(inputs, task_labels)),
        device=torch.device("cpu"),
        optimizer=torch.optim.Adam(model.parameters()),
        loss=torch.zeros(1),
    )


class TwoHeads(MultiTaskModule):
    """A trunk and two heads; each example goes through the head of its task alone."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(3, 4)
        self.heads = nn.ModuleList([nn.Linear(4, 2), nn.Linear(4, 2)])

    def forward(self, inputs: Tensor, task_labels: Tensor) -> Tensor:
        hidden = torch.tanh(self.trunk(inputs))
        outputs = hidden.new_zeros(len(inputs), 2)
        for task, head in enumerate(self.heads):
            if (task_labels == task).any():
                outputs[task_labels == task] = head(hidden[task_labels == task])
        return outputs


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 3))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(3, 2, (3, 1), padding=(1, 0), bias=False),
        nn.Flatten(),
        nn.Linear(18, 3),
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Sequence[int]]] = {
    "perceptron": (perceptron, (3,)),
    "convolutional": (convolutional, (2, 5, 6)),
}


def make_network(network: str, examples: int = 7) -> tuple[nn.Module, Tensor]:
    """A network and inputs in float64."""
    make, shape = NETWORKS[network]
    torch.manual_seed(0)
    return make().double(), torch.randn(examples, *shape, dtype=DOUBLE)


def move(model: nn.Module, size: float = 0.1) -> None:
    """Change all parameters a little."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn_like(parameter)


def make_record(
    label: str, matrix: Sequence[Sequence[float]] = ((0.5,),), **changes: Any
) -> Record:
    """A record from a label, an accuracy matrix and changes.

    Changes to ``configuration`` are added to what it has; ``strength`` and ``validate`` go there.
    """
    configuration = {
        **{"tasks": len(matrix), "hidden": [4], "data": "mnist", "threads": 1, "jobs": 1},
        "strength": changes.pop("strength", None),
        "validate": changes.pop("validate", False),
        **changes.pop("configuration", {}),
    }
    fields: dict[str, Any] = {
        "method": label.partition("[")[0].partition(" + ")[0],
        "label": label,
        "seed": 0,
        "average_accuracy": sum(matrix[-1]) / len(matrix),
        "forgetting": 0.25,
        "backward_transfer": -0.125,
        "accuracy_matrix": [list(row) for row in matrix],
        "training_seconds": 12.34,
        "estimation_seconds": 0.5,
        "state_bytes": 2**20,
        "trained_jointly": label == "joint",
        "configuration": configuration,
        "versions": {"python": "3"},
    }
    return Record(**(fields | changes))


def refused(words: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The message of a wrong command line, without tyro's box around it; the exit code is 2."""
    try:
        code: Any = main(words.split())
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    assert (code, captured.out) == (2, "")
    return " ".join(re.sub("[│─╭╮╰╯]", " ", captured.err).split())
