"""The networks that are trained."""

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from benchmarks.avalanche_names import MultiTaskModule
from benchmarks.speed.networks import perceptron

if TYPE_CHECKING:
    from benchmarks.scenarios import Scenario

CHANNELS = (32, 64, 64)


def make_model(scenario: "Scenario", hidden: Sequence[int]) -> nn.Module:
    """A network from flattened images ``[N, D]``, and task labels where it has heads, to logits."""
    in_colour = scenario.shape[0] > 1
    layers: list[nn.Module] = []
    features = scenario.features
    if in_colour:
        layers, features = convolutions(scenario.shape)
    if not scenario.multi_headed:
        return nn.Sequential(*layers, *perceptron(features, *hidden, scenario.classes))
    trunk = nn.Sequential(*layers, *perceptron(features, *hidden), *[nn.ReLU()] * bool(hidden))
    return MultiHeadedNetwork(trunk, (features, *hidden)[-1], scenario.classes, scenario.tasks)


def convolutions(shape: Sequence[int]) -> tuple[list[nn.Module], int]:
    """3×3 convolutions with ReLU and maxima, from flattened images to ``[N, F]``, and ``F``."""
    channels, height, width = shape
    layers: list[nn.Module] = [nn.Unflatten(1, tuple(shape))]
    for channels_in, channels_out in pairwise((channels, *CHANNELS)):
        layers += [nn.Conv2d(channels_in, channels_out, 3, padding=1), nn.ReLU()]
        layers.append(nn.MaxPool2d(2, ceil_mode=True))
        height, width = (height + 1) // 2, (width + 1) // 2
    return [*layers, nn.Flatten()], CHANNELS[-1] * height * width


class MultiHeadedNetwork(MultiTaskModule):  # type: ignore[misc]
    """Shared layers, and on top a linear layer for every task label, all there from the start."""

    def __init__(self, trunk: nn.Module, features: int, classes: int, tasks: int) -> None:
        """Put heads on a trunk whose outputs are ``[N, features]``."""
        super().__init__()
        self.trunk = trunk
        self.heads = nn.ModuleList(nn.Linear(features, classes) for _ in range(tasks))

    def forward(self, x: Tensor, task_labels: Tensor | None) -> Tensor | dict[int, Tensor]:
        """Logits ``[N, classes]`` of inputs ``[N, ...]``, each of its own task's head.

        Without task labels, the logits of all tasks that have been trained, by task.
        """
        hidden = self.trunk(x)
        if task_labels is None:
            return {task: self.heads[task](hidden) for task in self.known_train_tasks_labels}
        present = sorted(set(task_labels.tolist()))
        if len(present) == 1:
            only: Tensor = self.heads[present[0]](hidden)
            return only
        rows = {task: torch.nonzero(task_labels == task).flatten() for task in present}
        logits = torch.cat([self.heads[task](hidden[rows[task]]) for task in present])
        return logits[torch.cat(list(rows.values())).argsort()]
