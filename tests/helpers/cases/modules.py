"""Small modules that the cases are built from, and ways to put off building them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Build = Callable[[], nn.Module]


def sequential(*modules: Build) -> Build:
    """Put off making a Sequential until the seed is set."""
    return lambda: nn.Sequential(*(module() for module in modules))


def linear(d_in: int, d_out: int, bias: bool = True) -> Build:
    """Put off making a Linear."""
    return lambda: nn.Linear(d_in, d_out, bias=bias)


def later(kind: type[nn.Module], *args: Any, **options: Any) -> Build:
    """Put off making any module."""
    return lambda: kind(*args, **options)


def applied(function: Callable[[Tensor], Tensor]) -> Build:
    """Put off making a module that applies a function."""
    return lambda: Apply(function)


def using(function: Callable[[Any, Tensor], Tensor], **shapes: tuple[int, ...]) -> Build:
    """Put off making a module that applies a function of itself, its parameters, and its input."""
    return lambda: Uses(function, **shapes)


def shaken(build: Build) -> Build:
    """Move every parameter of a module away from special values, such as a scale of 1."""

    def build_and_shake() -> nn.Module:
        module = build()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
            for name, buffer in module.named_buffers():
                if name.endswith("running_mean"):
                    buffer.uniform_(-1, 0)
                if name.endswith("running_var"):
                    buffer.uniform_(0.5, 2)
        return module

    return build_and_shake


class Apply(nn.Module):
    """Apply a function without parameters."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        """Keep the function."""
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """Apply."""
        return self.function(x)


class Uses(nn.Module):
    """Apply a function of the module itself, which owns parameters, and of the input."""

    def __init__(
        self, function: Callable[[Any, Tensor], Tensor], **shapes: tuple[int, ...]
    ) -> None:
        """Make the parameters and keep the function."""
        super().__init__()
        self.function = function
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(0.5 * torch.randn(shape)))

    def forward(self, x: Tensor) -> Tensor:
        """Apply."""
        return self.function(self, x)


class MeanOver(nn.Module):
    """Average over the axes between the batch axis and the last (or after the second)."""

    def __init__(self, *axes: int) -> None:
        """Remember the axes."""
        super().__init__()
        self.axes = axes

    def forward(self, x: Tensor) -> Tensor:
        """Average."""
        return x.mean(dim=self.axes)


class ChannelsFirst(nn.Module):
    """Turn ``[N, T, C]`` into ``[N, C, T]``, the layout of sequence losses."""

    def forward(self, x: Tensor) -> Tensor:
        """Swap the last two axes."""
        return x.transpose(1, 2)


class SwapFirst(nn.Module):
    """Turn ``[N, T, d]`` into ``[T, N, d]``, as time-first models do."""

    def forward(self, x: Tensor) -> Tensor:
        """Swap the first two axes."""
        return x.transpose(0, 1)


class First(nn.Module):
    """Keep the first entry of the first axis, as classifiers on a leading token do."""

    def forward(self, x: Tensor) -> Tensor:
        """Drop the others."""
        return x[0]


class Twice(nn.Module):
    """Call one layer twice, with a nonlinearity between."""

    def __init__(self, layer: nn.Module) -> None:
        """Keep the layer."""
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer, the nonlinearity and the layer again."""
        return torch.tanh(self.layer(torch.tanh(self.layer(x))))


class BothWays(nn.Module):
    """Call one layer on ``[N, T, d]`` and on ``[T, N, d]``."""

    def __init__(self, layer: nn.Module) -> None:
        """Keep the layer."""
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer with the batch axis first, and again with it second."""
        hidden = torch.tanh(self.layer(x)).transpose(0, 1)
        return torch.tanh(self.layer(hidden)).transpose(0, 1)


class ByHand(nn.Module):
    """A recurrent network written as a loop over time."""

    def __init__(self, width: int, classes: int) -> None:
        """Make the layers."""
        super().__init__()
        self.inner, self.outer = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Classify the last state."""
        state = torch.ones_like(x[:, 0])
        for step in x.unbind(dim=1):
            state = torch.tanh(self.inner(step) + self.outer(state))
        logits: Tensor = self.head(state)
        return logits


class Residual(nn.Module):
    """Add a layer's output to its input, which is therefore used twice."""

    def __init__(self, layer: nn.Module) -> None:
        """Keep the layer."""
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer beside the identity."""
        return x + torch.tanh(self.layer(x))


class Tied(nn.Module):
    """Look tokens up in a table that is also the weight of the output layer."""

    def __init__(self, tokens: int, width: int, pooled: bool, **options: Any) -> None:
        """Make the layers and tie their weights."""
        super().__init__()
        self.table = nn.Embedding(tokens, width, **options)
        self.hidden = nn.Linear(width, width)
        self.head = nn.Linear(width, tokens)
        self.head.weight = self.table.weight
        self.pooled = pooled

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of the whole sequence, or of every token as ``[N, C, T]``."""
        hidden = torch.tanh(self.hidden(self.table(x)))
        if self.pooled:
            return self.head(hidden.mean(dim=1))
        return self.head(hidden).transpose(1, 2)
