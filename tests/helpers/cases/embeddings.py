"""Embeddings, alone and tied to an output layer."""

import torch
from torch import nn
from torch.nn import functional as F

from tests.helpers.cases.case import Case, derived, diagonal, layouts_of
from tests.helpers.cases.modules import (
    ChannelsFirst,
    MeanOver,
    SwapFirst,
    Tied,
    applied,
    later,
    linear,
    sequential,
    using,
)

EMBEDDINGS: tuple[Case, ...] = (
    Case(
        "embedding-single-tokens",
        sequential(later(nn.Embedding, 4, 3), nn.Tanh, linear(3, 3)),
        (),
        vocabulary=4,
    ),
    Case(
        "embedding-pooled",
        sequential(later(nn.Embedding, 6, 4), nn.Tanh, lambda: MeanOver(1), linear(4, 3)),
        (4,),
        vocabulary=6,
        shared=True,
    ),
    Case(
        "embedding-padding-pooled",
        sequential(
            later(nn.Embedding, 4, 3, padding_idx=1), nn.Tanh, lambda: MeanOver(1), linear(3, 3)
        ),
        (3,),
        vocabulary=4,
        shared=True,
    ),
    Case(
        "embedding-token-outputs",
        sequential(later(nn.Embedding, 5, 4), nn.Tanh, linear(4, 3), ChannelsFirst),
        (3,),
        (3, 3),
        vocabulary=5,
        shared=True,
    ),
    Case(
        "embedding-padding-flattened-outputs",
        sequential(
            later(nn.Embedding, 4, 3, padding_idx=-1),
            linear(3, 3),
            nn.Tanh,
            linear(3, 3),
            lambda: nn.Flatten(0, 1),
        ),
        (2,),
        rows=2,
        vocabulary=4,
        shared=True,
    ),
    Case(
        "embedding-linear",
        sequential(later(nn.Embedding, 5, 4), linear(4, 3), ChannelsFirst),
        (3,),
        (3, 3),
        vocabulary=5,
        shared=True,
    ),
    Case(
        "embedding-grid",
        sequential(
            later(nn.Embedding, 5, 3),
            applied(lambda x: x.movedim(-1, 1)),
            later(nn.Conv2d, 3, 2, 2),
            nn.Tanh,
            nn.Flatten,
            linear(4, 3),
        ),
        (2, 3),
        vocabulary=5,
        shared=True,
    ),
    Case(
        "embedding-time-first",
        sequential(
            SwapFirst,
            later(nn.Embedding, 5, 3),
            linear(3, 4),
            nn.Tanh,
            lambda: MeanOver(0),
            linear(4, 3),
        ),
        (3,),
        vocabulary=5,
        shared=True,
    ),
    Case(
        "embedding-merged-rows",
        sequential(
            lambda: nn.Flatten(0, 1),
            later(nn.Embedding, 5, 3),
            nn.Tanh,
            lambda: nn.Unflatten(0, (-1, 3)),
            nn.Flatten,
            linear(9, 3),
        ),
        (3,),
        vocabulary=5,
        shared=True,
    ),
    Case(
        "embedding-twice",
        sequential(
            using(
                lambda m, x: F.embedding(x[:, :2], m.w).mean(1) * F.embedding(x[:, 2], m.w),
                w=(4, 3),
            ),
            linear(3, 3),
        ),
        (3,),
        vocabulary=4,
        shared=True,
        layouts=layouts_of("lookup", "0.w"),
    ),
    Case(
        "embedding-tied",
        lambda: Tied(5, 4, pooled=True),
        (3,),
        (5,),
        vocabulary=5,
        shared=True,
        layouts=layouts_of("tied", "table.weight"),
    ),
    Case(
        "embedding-tied-token-outputs",
        lambda: Tied(4, 3, pooled=False),
        (3,),
        (4, 3),
        vocabulary=4,
        shared=True,
        layouts=layouts_of("tied", "table.weight"),
    ),
    Case(
        "embedding-tied-padding",
        lambda: Tied(4, 3, pooled=True, padding_idx=2),
        (3,),
        (4,),
        vocabulary=4,
        shared=True,
        layouts=layouts_of("tied", "table.weight"),
    ),
    Case(
        "embedding-tied-transposed",
        using(
            lambda m, x: torch.tanh(F.embedding(x, m.w)).mean(dim=1) @ m.w.t() + m.b,
            w=(5, 3),
            b=(5,),
        ),
        (3,),
        (5,),
        vocabulary=5,
        shared=True,
        layouts=derived("w") + diagonal("b"),
    ),
)
