"""Uses of parameters for which there is no rule."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.helpers.cases.attention_modules import SelfAttention
from tests.helpers.cases.case import Case, diagonal
from tests.helpers.cases.modules import SwapFirst, linear, sequential, using
from tests.helpers.oracles import BlockLayout


class MeanOfSequence(nn.Module):
    """Average the outputs of a recurrent layer over time."""

    def __init__(self, layer: nn.LSTM | nn.GRU) -> None:
        """Keep the layer."""
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Run and average."""
        outputs: Tensor = self.layer(x)[0]
        return outputs.mean(dim=1 if self.layer.batch_first else 0)


class Pairs(nn.Module):
    """A bilinear form of two halves of the input."""

    def __init__(self) -> None:
        """Make the layer."""
        super().__init__()
        self.form = nn.Bilinear(2, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Apply it."""
        form: Tensor = self.form(x[:, :2], x[:, 2:])
        return form


class LeadingToken(nn.Module):
    """Put a learned token before all others, attend to them, and keep it alone."""

    def __init__(self) -> None:
        """Make the token and the layers."""
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return what the token attends to."""
        tokens = torch.cat([self.token.expand(len(x), 1, 4), x], dim=1)
        attended: Tensor = self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return attended[:, 0]


def recurrent(prefix: str, layers: int = 1) -> tuple[BlockLayout, ...]:
    """Return the layouts of an LSTM's or a GRU's parameters."""
    kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    return diagonal(*(f"{prefix}.{kind}_l{i}" for i in range(layers) for kind in kinds))


WITHOUT_RULE: tuple[Case, ...] = (
    Case(
        "lstm",
        sequential(
            linear(3, 3),
            lambda: MeanOfSequence(nn.LSTM(3, 2, batch_first=True)),
            nn.Tanh,
            linear(2, 3),
        ),
        (3, 3),
        shared=True,
        layouts=recurrent("1.layer"),
        unsupported="diagonal",
    ),
    Case(
        "gru-two-layers",
        sequential(
            lambda: MeanOfSequence(nn.GRU(2, 2, num_layers=2, batch_first=True)), linear(2, 3)
        ),
        (3, 2),
        shared=True,
        layouts=recurrent("0.layer", 2),
        unsupported="diagonal",
    ),
    Case(
        "lstm-time-first",
        sequential(
            SwapFirst,
            lambda: MeanOfSequence(nn.LSTM(3, 2)),
            linear(2, 3),
        ),
        (3, 3),
        shared=True,
        layouts=recurrent("1.layer"),
        unsupported="diagonal",
    ),
    Case(
        "prelu",
        sequential(linear(4, 5), nn.PReLU, linear(5, 4), lambda: nn.PReLU(4), linear(4, 3)),
        (4,),
        layouts=diagonal("1.weight", "3.weight"),
        unsupported="diagonal",
    ),
    Case(
        "bilinear",
        sequential(linear(4, 4), nn.Tanh, Pairs, nn.Tanh, linear(3, 3)),
        (4,),
        layouts=diagonal("2.form.weight", "2.form.bias"),
        unsupported="diagonal",
    ),
    Case(
        "leading-token",
        sequential(LeadingToken, linear(4, 3)),
        (2, 4),
        shared=True,
        layouts=diagonal("0.token"),
        unsupported="diagonal",
    ),
    Case(
        "attention-with-learned-key",
        sequential(
            linear(3, 4),
            lambda: SelfAttention(4, 2, batch_first=True, add_bias_kv=True),
            nn.Flatten,
            linear(8, 3),
        ),
        (2, 3),
        shared=True,
        layouts=diagonal("1.attention.bias_k", "1.attention.bias_v"),
        unsupported="diagonal",
    ),
    Case(
        "einsum",
        sequential(
            using(lambda m, x: torch.einsum("ntd,hde->nhe", x, m.w).flatten(1), w=(2, 4, 3)),
            nn.Tanh,
            linear(6, 3),
        ),
        (3, 4),
        shared=True,
        layouts=diagonal("0.w"),
        unsupported="diagonal",
    ),
    Case(
        "used-with-and-without-a-rule",
        sequential(
            using(lambda m, x: F.linear(x, m.w) + torch.einsum("ni,oi->no", x**2, m.w), w=(3, 4)),
            nn.Tanh,
            linear(3, 3),
        ),
        (4,),
        shared=True,
        layouts=diagonal("0.w"),
        unsupported="diagonal",
    ),
)
