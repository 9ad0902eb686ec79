"""The parts that the models of the rows are made of."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from benchmarks.peers.problem import Activation

Maker = Callable[[], nn.Module]


def stack(*makers: Maker | None) -> Callable[[Activation], nn.Module]:
    """A chain of modules, made only once the seed is set; None stands for the activation."""
    return lambda activation: nn.Sequential(
        *(activation() if maker is None else maker() for maker in makers)
    )


def made(kind: Callable[..., nn.Module], *args: object, **options: object) -> Maker:
    """Put off making a module."""
    return lambda: kind(*args, **options)


def linear(d_in: int, d_out: int, bias: bool = True) -> Maker:
    """Put off making a Linear."""
    return made(nn.Linear, d_in, d_out, bias=bias)


class MeanOver(nn.Module):
    """Average over some axes."""

    def __init__(self, *axes: int) -> None:
        """Remember the axes."""
        super().__init__()
        self.axes = axes

    def forward(self, x: Tensor) -> Tensor:
        """Average."""
        return x.mean(dim=self.axes)


class Swap(nn.Module):
    """Exchange two axes."""

    def __init__(self, first: int, second: int) -> None:
        """Remember the axes."""
        super().__init__()
        self.axes = first, second

    def forward(self, x: Tensor) -> Tensor:
        """Exchange them."""
        return x.transpose(*self.axes)


class Mix(nn.Module):
    """Add the mean over positions to ``[N, T, d]``, so that the positions depend on each other."""

    def forward(self, x: Tensor) -> Tensor:
        """Mix."""
        return x + x.mean(dim=1, keepdim=True)


class Twice(nn.Module):
    """Call one layer twice."""

    def __init__(self, layer: nn.Module, activation: nn.Module) -> None:
        """Keep the layer."""
        super().__init__()
        self.layer = layer
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Apply layer and activation, twice."""
        output: Tensor = self.activation(self.layer(self.activation(self.layer(x))))
        return output


class Part(nn.Module):
    """Keep one entry of what a module returns, such as the output of an attention layer."""

    def __init__(self, module: nn.Module, copies: int = 1, entry: int = 0) -> None:
        """Keep the module, and how often it wants its input."""
        super().__init__()
        self.module = module
        self.copies = copies
        self.entry = entry

    def forward(self, x: Tensor) -> Tensor:
        """Call the module."""
        output: Tensor = self.module(*[x] * self.copies)[self.entry]
        return output


class CrossAttention(nn.Module):
    """Attend from the first position to all, with keys and values of another width."""

    def __init__(self, width: int, heads: int, other: int) -> None:
        """Make the layers."""
        super().__init__()
        self.query = nn.Linear(other, width)
        self.attention = nn.MultiheadAttention(
            width, heads, kdim=other, vdim=other, batch_first=True
        )

    def forward(self, x: Tensor) -> Tensor:
        """Attend."""
        output: Tensor = self.attention(self.query(x[:, :2]), x, x)[0]
        return output


class Functional(nn.Module):
    """A parameter of its own in a call of ``F.linear``."""

    def __init__(self, d_in: int, d_out: int) -> None:
        """Make the parameters."""
        super().__init__()
        self.w = nn.Parameter(0.5 * torch.randn(d_out, d_in))
        self.b = nn.Parameter(0.1 * torch.randn(d_out))

    def forward(self, x: Tensor) -> Tensor:
        """Apply them."""
        return F.linear(x, self.w, self.b)


class Product(nn.Module):
    """A parameter of its own in a matrix product."""

    def __init__(self, d_in: int, d_out: int) -> None:
        """Make the parameter."""
        super().__init__()
        self.w = nn.Parameter(0.5 * torch.randn(d_in, d_out))

    def forward(self, x: Tensor) -> Tensor:
        """Apply it."""
        return x @ self.w


class Decoder(nn.Module):
    """A decoder layer whose memory is its own input."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        """Make the layer, without dropout."""
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(width, heads, hidden, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """Decode the first two positions."""
        output: Tensor = self.layer(x[:, :2], x)
        return output


class ScaleShift(nn.Module):
    """Multiply with a parameter and add one, elementwise."""

    def __init__(self, width: int) -> None:
        """Make the parameters."""
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.shift = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """Apply them."""
        return x * self.scale + self.shift


class PositionalEmbedding(nn.Module):
    """Add a learned vector to every position, as transformers do."""

    def __init__(self, positions: int, width: int) -> None:
        """Make the table."""
        super().__init__()
        self.table = nn.Embedding(positions, width)

    def forward(self, x: Tensor) -> Tensor:
        """Add it."""
        positions: Tensor = self.table(torch.arange(x.shape[1]))
        return x + positions


def tied_linears(activation: Activation) -> nn.Module:
    """Two Linear modules that own the same weight."""
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    return nn.Sequential(first, activation(), second, activation(), nn.Linear(4, 3))


def tied_embedding(activation: Activation) -> nn.Module:
    """An embedding whose table is also the weight of the output layer, as in language models."""
    embedding, output = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
    output.weight = embedding.weight
    return nn.Sequential(embedding, activation(), MeanOver(1), output)


def batch_norm(kind: Callable[[int], nn.Module], width: int) -> Maker:
    """A BatchNorm whose running statistics are worth having."""

    def make() -> nn.Module:
        norm = kind(width)
        nn.init.uniform_(norm.get_buffer("running_mean"), -1, 1)
        nn.init.uniform_(norm.get_buffer("running_var"), 0.5, 2)
        return norm

    return make


def weight_normed(maker: Maker) -> Maker:
    """Reparametrise a layer's weight by lengths and directions."""
    return lambda: parametrizations.weight_norm(maker())
