"""Parameters that are multiplied with or added to data element by element."""

import torch
from torch import nn

from tests.helpers.cases.case import Case, derived, diagonal
from tests.helpers.cases.modules import (
    ChannelsFirst,
    MeanOver,
    SwapFirst,
    later,
    linear,
    sequential,
    using,
)

ELEMENTWISE: tuple[Case, ...] = (
    Case(
        "layer-scale",
        sequential(
            linear(4, 5), using(lambda m, x: x * m.gamma, gamma=(5,)), nn.Tanh, linear(5, 3)
        ),
        (4,),
        layouts=diagonal("1.gamma"),
    ),
    Case(
        "scalar-scale",
        sequential(linear(4, 5), nn.Tanh, linear(5, 3), using(lambda m, x: m.s * x, s=())),
        (4,),
        layouts=diagonal("3.s"),
    ),
    Case(
        "channel-scale",
        sequential(
            later(nn.Conv2d, 2, 3, 2),
            using(lambda m, x: torch.mul(m.s, x), s=(3, 1, 1)),
            nn.Tanh,
            nn.Flatten,
            linear(12, 3),
        ),
        (2, 3, 3),
        shared=True,
        layouts=diagonal("1.s"),
    ),
    Case(
        "learned-positions",
        sequential(
            linear(4, 4),
            using(lambda m, x: x + m.position, position=(3, 4)),
            nn.Tanh,
            lambda: MeanOver(1),
            linear(4, 3),
        ),
        (3, 4),
        shared=True,
        layouts=diagonal("1.position"),
    ),
    Case(
        "learned-positions-leading-one",
        sequential(
            using(lambda m, x: m.position + x, position=(1, 3, 4)),
            nn.Tanh,
            linear(4, 3),
            ChannelsFirst,
        ),
        (3, 4),
        (3, 3),
        shared=True,
        layouts=diagonal("0.position"),
    ),
    Case(
        "learned-positions-time-first",
        sequential(
            SwapFirst,
            using(lambda m, x: x + m.position, position=(3, 1, 4)),
            nn.Tanh,
            linear(4, 3),
            lambda: MeanOver(0),
        ),
        (3, 4),
        shared=True,
        layouts=diagonal("1.position"),
    ),
    Case(
        "scale-and-shift-merged-rows",
        sequential(
            lambda: nn.Flatten(0, 1),
            using(lambda m, x: x * m.scale - m.shift, scale=(4,), shift=(4,)),
            nn.Tanh,
            linear(4, 3),
            lambda: nn.Unflatten(0, (-1, 3)),
            lambda: MeanOver(1),
        ),
        (3, 4),
        shared=True,
        layouts=diagonal("1.scale", "1.shift"),
    ),
    Case(
        "add-and-subtract-multiples",
        sequential(
            using(
                lambda m, x: torch.sub(torch.add(x, m.a, alpha=0.5), m.b, alpha=2),
                a=(4,),
                b=(4,),
            ),
            nn.Tanh,
            linear(4, 3),
        ),
        (4,),
        layouts=diagonal("0.a", "0.b"),
    ),
    Case(
        "parameter-minus-data",
        sequential(using(lambda m, x: m.a - x, a=(4,)), nn.Tanh, linear(4, 3)),
        (4,),
        layouts=diagonal("0.a"),
    ),
    Case(
        "scale-twice",
        sequential(
            using(lambda m, x: torch.tanh(x * m.s) * m.s + m.s, s=(4,)), nn.Tanh, linear(4, 3)
        ),
        (4,),
        layouts=diagonal("0.s"),
    ),
    Case(
        "scale-that-broadcasts-the-data",
        sequential(
            using(lambda m, x: x[:, None] * m.s, s=(3, 4)), nn.Tanh, linear(4, 2), nn.Flatten
        ),
        (4,),
        (6,),
        shared=True,
        layouts=diagonal("0.s"),
    ),
    Case(
        "prelu",
        sequential(linear(4, 5), nn.PReLU, linear(5, 4), lambda: nn.PReLU(4), linear(4, 3)),
        (4,),
        layouts=(*diagonal("1.weight"), *derived("3.weight")),
    ),
    Case(
        "divided-and-raised",
        sequential(
            using(lambda m, x: (x / (3 + m.a) + x / m.b).abs() ** m.b, a=(4,), b=(4,)), linear(4, 3)
        ),
        (4,),
        layouts=(*derived("0.a"), *diagonal("0.b")),
    ),
)
