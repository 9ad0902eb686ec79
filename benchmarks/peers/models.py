"""The parts that the models of the rows are made of, besides those of PyTorch.

What has a name in capitals makes a new part whenever it is called.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Module = Callable[[], nn.Module]
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


def apply(
    function: Callable[[Any, Any], Tensor], **parts: Callable[[], nn.Module | Tensor]
) -> Module:
    """What makes an :class:`Apply`, and its parts with it."""
    return lambda: Apply(function, **{name: make() for name, make in parts.items()})


def parameter(*shape: int, scale: float = 1.0) -> Callable[[], nn.Parameter]:
    """What makes a random parameter."""
    return lambda: nn.Parameter(scale * torch.randn(*shape))


def mean_over(*axes: int) -> Module:
    """Average over some axes."""
    return apply(lambda _, x: x.mean(dim=axes))


def first_output(module: Module, inputs: int = 1) -> Module:
    """The first of several outputs of a module, which wants its input so many times."""
    return apply(lambda own, x: own.module(*[x] * inputs)[0], module=module)


def twice(layer: Module, *after: Module) -> Layers:
    """A layer that is called twice, and what comes after it."""

    def forward(own: Any, x: Tensor) -> Tensor:
        result: Tensor = own.activation(own.layer(own.activation(own.layer(x))))
        return result

    return lambda act: [apply(forward, layer=layer, activation=act)(), *(make() for make in after)]


def as_graphs(x: Tensor) -> dict[str, Tensor]:
    """The rows of ``[N, T, d]`` that are no padding, by a feature, and how many are whose."""
    kept = (x[..., 0] > 0).index_fill(1, torch.tensor(0), value=True)
    return {"sizes": kept.sum(dim=1), "rows": x[kept]}


def _sum_rows(own: Any, x: Tensor | Mapping[str, Tensor]) -> Tensor:
    graphs = x if isinstance(x, Mapping) else as_graphs(x)
    sums = graphs["rows"].new_zeros(len(graphs["sizes"]), 4)
    owners = torch.repeat_interleave(graphs["sizes"])
    return sums.index_add(0, owners, own.layer(graphs["rows"]))


def _sort_rows(own: Any, x: Tensor) -> Tensor:
    order = x[..., 0].flatten().argsort()
    found: Tensor = own.layer(x.flatten(0, -2)[order])[order.argsort()]
    return found.view(*x.shape[:-1], -1)


LINEAR = partial(nn.Linear, 5, 4)
SWAP_FIRST = apply(lambda _, x: x.transpose(0, 1))
SWAP_LAST = apply(lambda _, x: x.transpose(1, 2))
# The mean over positions is added to ``[N, T, d]``, so that the positions depend on each other.
MIX = apply(lambda _, x: x + x.mean(dim=1, keepdim=True))
LSTM = first_output(partial(nn.LSTM, 3, 4, batch_first=True))
ATTENTION = first_output(partial(nn.MultiheadAttention, 4, 2, batch_first=True), inputs=3)
ATTENTION_TIME_FIRST = first_output(partial(nn.MultiheadAttention, 4, 2), inputs=3)
# From the first two positions to all, with keys and values of another width.
CROSS_ATTENTION = apply(
    lambda own, x: own.attention(own.query(x[:, :2]), x, x)[0],
    query=partial(nn.Linear, 3, 4),
    attention=partial(nn.MultiheadAttention, 4, 2, kdim=3, vdim=3, batch_first=True),
)
# The first two positions are decoded, with the input itself as memory.
DECODER = apply(
    lambda own, x: own.layer(x[:, :2], x),
    layer=partial(nn.TransformerDecoderLayer, 4, 2, 5, dropout=0.0, batch_first=True),
)
FUNCTIONAL_LINEAR = apply(
    lambda own, x: F.linear(x, own.w, own.b),
    w=parameter(4, 5, scale=0.5),
    b=parameter(4, scale=0.1),
)
PRODUCT = apply(lambda own, x: x @ own.w, w=parameter(5, 4, scale=0.5))
SCALE_SHIFT = apply(
    lambda own, x: x * own.scale + own.shift,
    scale=lambda: nn.Parameter(torch.ones(4)),
    shift=lambda: nn.Parameter(torch.zeros(4)),
)
# A learned vector is added to every position, as in transformers.
POSITIONAL = apply(
    lambda own, x: x + own.table(torch.arange(x.shape[1])), table=partial(nn.Embedding, 3, 4)
)
# The rows of graphs, or of padded inputs without the padding, go through a Linear and are summed.
SUMMED_ROWS = apply(_sum_rows, layer=LINEAR)
# Rows are sorted by a feature, go through a Linear, and are put back into their places.
SORTED_ROWS = apply(_sort_rows, layer=LINEAR)
# The second axis is multiplied with a sparse matrix, a buffer.
NEIGHBOURS = apply(
    lambda own, x: (
        (own.matrix @ x.movedim(1, 0).flatten(1)).unflatten(1, x[:, 0].shape).movedim(0, 1)
    ),
    matrix=lambda: (torch.eye(4) + 0.5 * torch.eye(4).roll(1, dims=0)).to_sparse(),
)
# A learned token is put before those of the data.
TOKEN_BEFORE = apply(
    lambda own, x: torch.cat([own.token.expand(len(x), -1, -1), x], dim=1),
    token=parameter(1, 1, 4),
)
# Attention between three positions, with a bias looked up by their distance, as in Swin.
RELATIVE_BIAS = apply(
    lambda own, x: (x @ x.mT + own.table[own.index]).softmax(dim=-1) @ x,
    table=parameter(5),
    index=lambda: torch.arange(3)[:, None] - torch.arange(3) + 2,
)


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


def batch_norm(kind: Callable[[int], nn.Module], width: int) -> nn.Module:
    """A BatchNorm whose running statistics are worth having."""
    norm = kind(width)
    nn.init.uniform_(norm.get_buffer("running_mean"), -1, 1)
    nn.init.uniform_(norm.get_buffer("running_var"), 0.5, 2)
    return norm


def tied_linears(activation: Activation) -> list[nn.Module]:
    """Two Linear modules that own the same weight."""
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    return [first, activation(), second, activation(), nn.Linear(4, 3)]


def tied_embedding(activation: Activation) -> list[nn.Module]:
    """An embedding whose table is also the weight of the output layer, as in language models."""
    embedding, output = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
    output.weight = embedding.weight
    return [embedding, activation(), mean_over(1)(), output]
