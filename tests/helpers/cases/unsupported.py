"""Uses of parameters for which there is no rule."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
        "used-with-and-without-a-rule",
        sequential(
            using(lambda m, x: F.linear(x, m.w) + torch.cdist(x, m.w), w=(3, 4)),
            nn.Tanh,
            linear(3, 3),
        ),
        (4,),
        shared=True,
        layouts=diagonal("0.w"),
        unsupported="diagonal",
    ),
    Case(
        "distances",
        sequential(linear(4, 4), using(lambda m, x: torch.cdist(x, m.w), w=(5, 4)), linear(5, 3)),
        (4,),
        layouts=diagonal("1.w"),
        unsupported="diagonal",
    ),
    Case(
        "bag-of-tokens",
        sequential(using(lambda m, x: F.embedding_bag(x, m.w, mode="sum"), w=(5, 4)), linear(4, 3)),
        (3,),
        vocabulary=5,
        shared=True,
        layouts=diagonal("0.w"),
        unsupported="diagonal",
    ),
)
