"""Sequences and images whose sizes differ from batch to batch."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rotate_ewc import EKFACLinearOperator
from tests.helpers.cases.attention_modules import BatchSecond, SelfAttention, Windows
from tests.helpers.cases.modules import (
    Apply,
    BothWays,
    Build,
    ByHand,
    MeanOver,
    SwapFirst,
    applied,
    later,
    linear,
    sequential,
    shaken,
    using,
)
from tests.helpers.exactness import EXACT_FISHERS, FISHER_TYPES, assert_exact_diagonal
from tests.helpers.oracles import Fisher, dense_fisher, parameter_shapes

# Examples in a batch, and their length; also as many examples as tokens, and single ones.
BATCHES = ((3, 3), (2, 4), (1, 5), (4, 2), (3, 1), (2, 6))


class TimeMajorRows(nn.Module):
    """Run a module on rows ``[T * N, d]``, ordered by time first."""

    def __init__(self, inner: nn.Module) -> None:
        """Keep the module."""
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """Merge the first two axes, and back."""
        rows: Tensor = self.inner(x.transpose(0, 1).flatten(0, 1))
        return rows.unflatten(0, (x.shape[1], -1)).transpose(0, 1)


class Rows(nn.Module):
    """Run a module on rows ``[N * T, d]``."""

    def __init__(self, inner: nn.Module) -> None:
        """Keep the module."""
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """Merge the first two axes, and back."""
        rows: Tensor = self.inner(x.flatten(0, 1))
        return rows.unflatten(0, x.shape[:2])


def tokens(*middle: Build) -> Build:
    """Return a classifier of sequences with some layers in the middle."""
    return sequential(linear(3, 4), nn.Tanh, *middle, nn.Tanh, lambda: MeanOver(1), linear(4, 2))


MODELS: dict[str, Build] = {
    "linear": tokens(linear(4, 4)),
    "time-first": tokens(SwapFirst, linear(4, 4), SwapFirst),
    "both-ways": tokens(lambda: BothWays(nn.Linear(4, 4))),
    "rows": tokens(lambda: Rows(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)))),
    "time-major-rows": tokens(lambda: TimeMajorRows(nn.Sequential(nn.Linear(4, 4), nn.RMSNorm(4)))),
    "product": tokens(SwapFirst, using(lambda m, x: x @ m.w, w=(4, 4)), SwapFirst),
    "attention": tokens(lambda: SelfAttention(4, 2, batch_first=True)),
    "causal-attention": tokens(lambda: SelfAttention(4, 2, mask="causal", batch_first=True)),
    "attention-batch-second": tokens(lambda: BatchSecond(SelfAttention(4, 2))),
    "attention-padding": tokens(lambda: BatchSecond(SelfAttention(4, 1, mask="padding"))),
    "attention-windows": sequential(
        applied(lambda x: x[:, :, None].expand(-1, -1, 2, -1).cumsum(2).transpose(1, 2)),
        lambda: Windows(SelfAttention(3, 1, batch_first=True)),
        nn.Tanh,
        lambda: MeanOver(1, 2),
        linear(3, 2),
    ),
    "encoder": tokens(shaken(later(nn.TransformerEncoderLayer, 4, 2, 3, batch_first=True))),
    "positions": tokens(using(lambda m, x: x + m.w[: x.shape[1]], w=(6, 4))),
    "looked-up-positions": tokens(
        using(
            lambda m, x: x + F.embedding(torch.arange(x.shape[1]).expand(x.shape[:2]), m.w),
            w=(6, 4),
        )
    ),
    "scale": tokens(using(lambda m, x: x * m.s, s=(4,))),
    "scale-time-first": tokens(SwapFirst, using(lambda m, x: x * m.s, s=(4,)), SwapFirst),
    "convolution": sequential(
        applied(lambda x: x.mT),
        later(nn.Conv1d, 3, 4, 2, padding=1),
        nn.Tanh,
        later(nn.ConvTranspose1d, 4, 2, 3, stride=2),
        nn.Tanh,
        lambda: MeanOver(2),
        linear(2, 2),
    ),
    "loop": lambda: ByHand(3, 2),
    "derived": tokens(using(lambda m, x: F.linear(x, m.w.t().exp(), m.b), w=(4, 4), b=(4,))),
    "token-outputs": sequential(linear(3, 4), nn.Tanh, linear(4, 2), applied(lambda x: x.mT)),
    "flattened-outputs": sequential(
        SwapFirst, linear(3, 4), nn.Tanh, SwapFirst, lambda: nn.Flatten(0, 1), linear(4, 2)
    ),
}


@pytest.mark.parametrize(
    ("name", "fisher", "order"),
    [
        (name, EXACT_FISHERS[n % 2], ("forwards", "backwards")[n // 2 % 2])
        for n, name in enumerate(MODELS)
    ],
)
def test_lengths_that_differ(name: str, fisher: Fisher, order: str) -> None:
    """The exact matrix of a sum is the sum of those of its batches."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MODELS[name]().double().eval()
        inputs = [torch.randn(n, length, 3, dtype=torch.float64) for n, length in BATCHES]
        outputs = [model(x) for x in inputs]
        data = [
            (x, torch.randint(2, (len(f), *f.shape[2:])))
            for x, f in zip(inputs, outputs, strict=True)
        ]
    loss_func = nn.CrossEntropyLoss(reduction="sum")
    names = [name for name, _ in model.named_parameters()]
    dense = torch.stack([dense_fisher(model, loss_func, names, x, y, fisher) for x, y in data])
    operator = EKFACLinearOperator(
        model,
        loss_func,
        list(model.parameters()),
        data if order == "forwards" else data[::-1],
        fisher_type=FISHER_TYPES[fisher],
        separate_weight_and_bias=order == "forwards",
    )
    assert_exact_diagonal(operator, dense.sum(dim=0), parameter_shapes(model, names))


def test_images_of_other_sizes() -> None:
    """A fully convolutional network on images of several sizes."""
    build: Callable[[], nn.Module] = sequential(
        later(nn.Conv2d, 2, 3, 3, padding=1, stride=2),
        later(nn.BatchNorm2d, 3),
        nn.Tanh,
        later(nn.ConvTranspose2d, 3, 4, 2, groups=1),
        later(nn.GroupNorm, 2, 4),
        nn.Tanh,
        lambda: Apply(lambda x: x.mean((2, 3))),
        linear(4, 3),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = shaken(build)().double().eval()
        shapes = ((2, 2, 3, 3), (3, 2, 5, 2), (1, 2, 1, 4), (2, 2, 2, 2))
        data = [(torch.randn(s).double(), torch.randn(s[0], 3).double()) for s in shapes]
    loss_func = nn.MSELoss(reduction="sum")
    names = [name for name, _ in model.named_parameters()]
    dense = torch.stack([dense_fisher(model, loss_func, names, x, y, "type2") for x, y in data])
    operator = EKFACLinearOperator(
        model, loss_func, list(model.parameters()), data, fisher_type="type2"
    )
    assert_exact_diagonal(operator, dense.sum(dim=0), parameter_shapes(model, names))
