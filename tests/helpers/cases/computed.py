"""Parameters that reach layers through computations, or layers of different kinds."""

import torch
from torch import nn
from torch.nn import functional as F

from tests.helpers.cases.case import Case, derived
from tests.helpers.cases.modules import (
    MeanOver,
    SwapFirst,
    later,
    linear,
    sequential,
    using,
)
from tests.helpers.oracles import BlockLayout

COMPUTED: tuple[Case, ...] = (
    Case(
        "product-with-transpose",
        sequential(using(lambda m, x: x @ m.w.t(), w=(5, 4)), nn.Tanh, linear(5, 3)),
        (4,),
        layouts=derived("0.w"),
    ),
    Case(
        "product-with-slices",
        sequential(
            using(
                lambda m, x: torch.tanh(F.linear(x, m.w[:3], m.b[:3])) @ m.w[3:] + m.b[3:],
                w=(6, 4),
                b=(7,),
            ),
            nn.Tanh,
            linear(4, 3),
        ),
        (4,),
        layouts=derived("0.w", "0.b"),
    ),
    Case(
        "low-rank-update",
        sequential(
            using(
                lambda m, x: F.linear(x, m.w + m.up @ m.down),
                w=(5, 4),
                up=(5, 2),
                down=(2, 4),
            ),
            nn.Tanh,
            linear(5, 3),
        ),
        (4,),
        frozen=("0.w",),
        layouts=derived("0.up", "0.down"),
    ),
    Case(
        "standardised-conv",
        sequential(
            using(
                lambda m, x: F.conv2d(
                    x, (m.w - m.w.mean((1, 2, 3), True)) / m.w.std((1, 2, 3), keepdim=True), m.b
                ),
                w=(3, 2, 2, 2),
                b=(3,),
            ),
            nn.Tanh,
            nn.Flatten,
            linear(12, 3),
        ),
        (2, 3, 3),
        shared=True,
        layouts=(*derived("0.w"), BlockLayout(("0.b",), kind="bias")),
    ),
    Case(
        "one-plus-scale",
        sequential(linear(4, 4), using(lambda m, x: x * (1 + m.s), s=(4,)), nn.Tanh, linear(4, 3)),
        (4,),
        layouts=derived("1.s"),
    ),
    Case(
        "indexed-scale",
        sequential(
            later(nn.Conv2d, 2, 3, 2),
            using(lambda m, x: m.s[:, None, None] * x, s=(3,)),
            nn.Tanh,
            lambda: MeanOver(2, 3),
            linear(3, 3),
        ),
        (2, 3, 3),
        shared=True,
        layouts=derived("1.s"),
    ),
    Case(
        "looked-up-positions-time-first",
        sequential(
            SwapFirst,
            using(lambda m, x: x + F.embedding(torch.arange(len(x)), m.w)[:, None], w=(3, 4)),
            nn.Tanh,
            linear(4, 3),
            lambda: MeanOver(0),
        ),
        (3, 4),
        shared=True,
        layouts=derived("1.w"),
    ),
    Case(
        "sliced-positions",
        sequential(
            using(lambda m, x: x + m.w[: x.shape[1]], w=(4, 3)),
            nn.Tanh,
            linear(3, 3),
            lambda: MeanOver(1),
        ),
        (3, 3),
        shared=True,
        layouts=derived("0.w"),
    ),
    Case(
        "tied-autoencoder",
        sequential(
            using(
                lambda m, x: F.linear(torch.tanh(F.linear(x, m.w, m.b)), m.w.t(), m.c),
                w=(3, 4),
                b=(3,),
                c=(4,),
            )
        ),
        (4,),
        (4,),
        layouts=(
            *derived("0.w"),
            BlockLayout(("0.b",), kind="bias"),
            BlockLayout(("0.c",), kind="bias"),
        ),
    ),
    Case(
        "tied-autoencoder-by-products",
        using(lambda m, x: torch.tanh(F.linear(x, m.w)) @ m.w, w=(3, 4)),
        (2, 4),
        (2, 4),
        shared=True,
        layouts=derived("w"),
    ),
    Case(
        "weight-that-is-a-scale",
        sequential(
            using(lambda m, x: F.linear(x, m.w).tanh() + (x * m.w).sum(-1, True), w=(3, 4)),
            linear(3, 3),
            lambda: MeanOver(1),
        ),
        (3, 4),
        shared=True,
        layouts=derived("0.w"),
    ),
    Case(
        "bias-that-is-a-scale",
        sequential(
            using(lambda m, x: F.linear(x, m.w, m.b).tanh() * m.b, w=(3, 4), b=(3,)), linear(3, 3)
        ),
        (4,),
        layouts=(BlockLayout(("0.w",)), *derived("0.b")),
    ),
    Case(
        "weight-of-linear-and-convolution",
        sequential(
            using(
                lambda m, x: F.linear(x, m.w).tanh() * F.conv1d(x.mT, m.w[..., None]).tanh().mT,
                w=(3, 4),
            ),
            lambda: MeanOver(1),
            linear(3, 3),
        ),
        (3, 4),
        shared=True,
        layouts=derived("0.w"),
    ),
    Case(
        "gated-by-an-exponential",
        sequential(using(lambda m, x: (x @ m.w).tanh() * m.s.exp(), w=(4, 3), s=()), linear(3, 3)),
        (4,),
        layouts=(BlockLayout(("0.w",), transposed=True), *derived("0.s")),
    ),
    Case(
        "tied-convolutions",
        sequential(
            using(
                lambda m, x: F.conv_transpose1d(F.conv1d(x, m.w, m.b).tanh(), m.w, m.c),
                w=(3, 2, 2),
                b=(3,),
                c=(2,),
            ),
            nn.Tanh,
            nn.Flatten,
            linear(6, 3),
        ),
        (2, 3),
        shared=True,
        layouts=(
            *derived("0.w"),
            BlockLayout(("0.b",), kind="bias"),
            BlockLayout(("0.c",), kind="bias"),
        ),
    ),
    Case(
        "weight-and-its-double",
        sequential(
            using(lambda m, x: F.linear(F.linear(x, m.w).tanh(), 2 * m.w), w=(4, 4)), linear(4, 3)
        ),
        (4,),
        layouts=derived("0.w"),
    ),
    Case(
        "queries-that-are-learned",
        sequential(
            using(
                lambda m, x: ((x @ F.linear(m.queries, m.w, m.b).mT).softmax(dim=1).mT @ x).flatten(
                    1
                ),
                queries=(2, 3),
                w=(4, 3),
                b=(4,),
            ),
            linear(8, 3),
        ),
        (3, 4),
        shared=True,
        layouts=derived("0.queries", "0.w", "0.b"),
    ),
)
