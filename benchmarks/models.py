"""The networks that are trained."""

from collections.abc import Sequence
from itertools import pairwise

from torch import nn


def multilayer_perceptron(features: int, hidden: Sequence[int], classes: int) -> nn.Sequential:
    """Linear layers with ReLU between them.

    Args:
        features: Width of the input.
        hidden: Widths of the hidden layers.
        classes: Width of the output.

    Returns:
        A network from ``[N, features]`` to logits ``[N, classes]``, initialised from PyTorch's
        global random state.
    """
    layers: list[nn.Module] = []
    for width_in, width_out in pairwise((features, *hidden)):
        layers += [nn.Linear(width_in, width_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear((features, *hidden)[-1], classes))
