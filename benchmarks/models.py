"""The networks that are trained."""

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from benchmarks.scenarios import Scenario

CHANNELS = (32, 64, 128)


def make_model(scenario: "Scenario", hidden: Sequence[int]) -> nn.Module:
    """A network from flattened images ``[N, D]``, and task labels where it has heads, to logits."""
    in_colour = scenario.shape[0] > 1
    layers: list[nn.Module] = []
    features = scenario.features
    if in_colour:
        layers, features = convolutions(scenario.shape)
    if not scenario.multi_headed:
        return nn.Sequential(*layers, *multilayer_perceptron(features, hidden, scenario.classes))
    from benchmarks.multi_headed import MultiHeadedNetwork

    trunk = nn.Sequential(*layers, *hidden_layers(features, hidden))
    return MultiHeadedNetwork(trunk, (features, *hidden)[-1], scenario.classes, scenario.tasks)


def multilayer_perceptron(features: int, hidden: Sequence[int], classes: int) -> nn.Sequential:
    """Linear layers with ReLU between them, from ``[N, features]`` to logits ``[N, classes]``."""
    return nn.Sequential(
        *hidden_layers(features, hidden), nn.Linear((features, *hidden)[-1], classes)
    )


def hidden_layers(features: int, hidden: Sequence[int]) -> list[nn.Module]:
    """Linear layers, each with ReLU after it."""
    layers: list[nn.Module] = []
    for width_in, width_out in pairwise((features, *hidden)):
        layers += [nn.Linear(width_in, width_out), nn.ReLU()]
    return layers


def convolutions(shape: Sequence[int]) -> tuple[list[nn.Module], int]:
    """Three 3×3 convolutions with ReLU, from flattened images to ``[N, F]``, and ``F``."""
    channels, height, width = shape
    layers: list[nn.Module] = [nn.Unflatten(1, tuple(shape))]
    for channels_in, channels_out in pairwise((channels, *CHANNELS)):
        layers += [nn.Conv2d(channels_in, channels_out, 3, stride=2, padding=1), nn.ReLU()]
        height, width = (height + 1) // 2, (width + 1) // 2
    return [*layers, nn.Flatten()], CHANNELS[-1] * height * width
