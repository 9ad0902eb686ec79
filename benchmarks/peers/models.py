"""The parts that the models of the rows are made of, besides those of PyTorch."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

# Makes the activation; then the layers of a model, one after the other.
Activation = Callable[[], nn.Module]
Layers = Callable[[Activation], list[nn.Module]]


class Apply(nn.Module):
    """A function of an input and of parts: modules, parameters and buffers."""

    def __init__(self, function: Callable[[Any, Any], Tensor], **parts: nn.Module | Tensor) -> None:
        """Keep the function, and the parts as attributes for it to use."""
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, nn.Module | nn.Parameter):
                setattr(self, name, part)
            else:
                self.register_buffer(name, part)

    def forward(self, x: Any) -> Tensor:
        """Call the function with this module, which has the parts, and the input."""
        return self.function(self, x)


def mean_over(*axes: int) -> Apply:
    """Average over some axes."""
    return Apply(lambda _, x: x.mean(dim=axes))


def swap(first: int, second: int) -> Apply:
    """Exchange two axes."""
    return Apply(lambda _, x: x.transpose(first, second))


def mix() -> Apply:
    """Add the mean over positions to ``[N, T, d]``, so that the positions depend on each other."""
    return Apply(lambda _, x: x + x.mean(dim=1, keepdim=True))


def twice(layer: nn.Module, activation: nn.Module) -> Apply:
    """Call one layer twice."""
    return Apply(
        lambda own, x: own.activation(own.layer(own.activation(own.layer(x)))),
        layer=layer,
        activation=activation,
    )


def twice_linear(activation: Activation) -> list[nn.Module]:
    """A Linear module that is called twice."""
    return [twice(nn.Linear(4, 4), activation()), nn.Linear(4, 3)]


def twice_convolution(activation: Activation) -> list[nn.Module]:
    """A convolution that is called twice."""
    convolutions = twice(nn.Conv2d(2, 2, 3, padding=1), activation())
    return [convolutions, mean_over(2, 3), nn.Linear(2, 3)]


def first_output(module: nn.Module, inputs: int = 1) -> Apply:
    """The first of several outputs of a module, which wants its input so many times."""
    return Apply(lambda own, x: own.module(*[x] * inputs)[0], module=module)


def lstm() -> Apply:
    """The states of a recurrent network."""
    return first_output(nn.LSTM(3, 4, batch_first=True))


def self_attention(*, batch_first: bool = True) -> Apply:
    """Self-attention over tokens."""
    return first_output(nn.MultiheadAttention(4, 2, batch_first=batch_first), inputs=3)


def cross_attention() -> Apply:
    """Attend from the first two positions to all, with keys and values of another width."""
    return Apply(
        lambda own, x: own.attention(own.query(x[:, :2]), x, x)[0],
        query=nn.Linear(3, 4),
        attention=nn.MultiheadAttention(4, 2, kdim=3, vdim=3, batch_first=True),
    )


def decoder() -> Apply:
    """Decode the first two positions, with the input itself as memory."""
    layer = nn.TransformerDecoderLayer(4, 2, 5, dropout=0.0, batch_first=True)
    return Apply(lambda own, x: own.layer(x[:, :2], x), layer=layer)


def functional_linear() -> Apply:
    """Parameters of its own in a call of ``F.linear``."""
    return Apply(
        lambda own, x: F.linear(x, own.w, own.b),
        w=nn.Parameter(0.5 * torch.randn(4, 5)),
        b=nn.Parameter(0.1 * torch.randn(4)),
    )


def product() -> Apply:
    """A parameter of its own in a matrix product."""
    return Apply(lambda own, x: x @ own.w, w=nn.Parameter(0.5 * torch.randn(5, 4)))


def scale_shift() -> Apply:
    """Multiply with a parameter and add one, elementwise."""
    return Apply(
        lambda own, x: x * own.scale + own.shift,
        scale=nn.Parameter(torch.ones(4)),
        shift=nn.Parameter(torch.zeros(4)),
    )


def positional() -> Apply:
    """Add a learned vector to every position, as transformers do."""
    table = nn.Embedding(3, 4)
    return Apply(lambda own, x: x + own.table(torch.arange(x.shape[1])), table=table)


def as_graphs(x: Tensor) -> dict[str, Tensor]:
    """The rows of ``[N, T, d]`` that are no padding, by a feature, and how many are whose."""
    kept = (x[..., 0] > 0).index_fill(1, torch.tensor(0), value=True)
    return {"sizes": kept.sum(dim=1), "rows": x[kept]}


def summed_rows() -> Apply:
    """A Linear on the rows of graphs, or of padded inputs without the padding, and their sums."""

    def forward(own: Any, x: Tensor | Mapping[str, Tensor]) -> Tensor:
        graphs = x if isinstance(x, Mapping) else as_graphs(x)
        sums = graphs["rows"].new_zeros(len(graphs["sizes"]), 4)
        owners = torch.repeat_interleave(graphs["sizes"])
        return sums.index_add(0, owners, own.layer(graphs["rows"]))

    return Apply(forward, layer=nn.Linear(5, 4))


def experts() -> Apply:
    """Every row goes to the two of three Linear modules that a gate prefers."""

    def forward(own: Any, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        weights, chosen = own.gate(rows).softmax(dim=1).topk(2)
        found = torch.zeros_like(rows)
        for number, expert in enumerate(own.experts):
            row, place = torch.where(chosen == number)
            found = found.index_add(0, row, expert(rows[row]) * weights[row, place, None])
        return found.view_as(x)

    modules = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    return Apply(forward, gate=nn.Linear(4, 3), experts=modules)


def sorted_rows() -> Apply:
    """A Linear on rows sorted by a feature, which are then put back into their places."""

    def forward(own: Any, x: Tensor) -> Tensor:
        order = x[..., 0].flatten().argsort()
        found: Tensor = own.layer(x.flatten(0, -2)[order])[order.argsort()]
        return found.view(*x.shape[:-1], -1)

    return Apply(forward, layer=nn.Linear(5, 4))


def neighbours() -> Apply:
    """Multiply the second axis with a sparse matrix, a buffer."""
    matrix = (torch.eye(4) + 0.5 * torch.eye(4).roll(1, dims=0)).to_sparse()
    return Apply(
        lambda own, x: (
            (own.matrix @ x.movedim(1, 0).flatten(1)).unflatten(1, x[:, 0].shape).movedim(0, 1)
        ),
        matrix=matrix,
    )


def token_before() -> Apply:
    """Put a learned token before those of the data."""
    return Apply(
        lambda own, x: torch.cat([own.token.expand(len(x), -1, -1), x], dim=1),
        token=nn.Parameter(torch.randn(1, 1, 4)),
    )


def relative_bias() -> Apply:
    """Attention between three positions, with a bias looked up by their distance, as in Swin."""
    places = torch.arange(3)
    return Apply(
        lambda own, x: (x @ x.mT + own.table[own.index]).softmax(dim=-1) @ x,
        table=nn.Parameter(torch.randn(5)),
        index=places[:, None] - places + 2,
    )


def batch_norm(kind: Callable[[int], nn.Module], width: int) -> nn.Module:
    """A BatchNorm whose running statistics are worth having."""
    norm = kind(width)
    nn.init.uniform_(norm.get_buffer("running_mean"), -1, 1)
    nn.init.uniform_(norm.get_buffer("running_var"), 0.5, 2)
    return norm


def weight_normed() -> nn.Module:
    """A Linear whose weight is made from lengths and directions."""
    normed: nn.Module = parametrizations.weight_norm(nn.Linear(5, 4))
    return normed


def tied_linears(activation: Activation) -> list[nn.Module]:
    """Two Linear modules that own the same weight."""
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    return [first, activation(), second, activation(), nn.Linear(4, 3)]


def tied_embedding(activation: Activation) -> list[nn.Module]:
    """An embedding whose table is also the weight of the output layer, as in language models."""
    embedding, output = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
    output.weight = embedding.weight
    return [embedding, activation(), mean_over(1), output]
