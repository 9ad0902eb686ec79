"""Normalisation layers with learned scales and shifts."""

from torch import nn

from tests.helpers.cases.case import Case
from tests.helpers.cases.modules import (
    ChannelsFirst,
    MeanOver,
    SwapFirst,
    Twice,
    later,
    linear,
    sequential,
    shaken,
)

NORMALISATION: tuple[Case, ...] = (
    Case(
        "layer-norm",
        shaken(sequential(linear(4, 5), later(nn.LayerNorm, 5), nn.Tanh, linear(5, 3))),
        (4,),
    ),
    Case(
        "layer-norm-no-bias",
        shaken(sequential(linear(4, 5), later(nn.LayerNorm, 5, bias=False), nn.Tanh, linear(5, 3))),
        (4,),
    ),
    Case(
        "layer-norm-2d",
        shaken(sequential(later(nn.LayerNorm, (3, 4)), nn.Tanh, nn.Flatten, linear(12, 3))),
        (3, 4),
    ),
    Case(
        "layer-norm-2d-shared",
        shaken(
            sequential(
                linear(3, 3),
                later(nn.LayerNorm, (2, 3)),
                nn.Tanh,
                lambda: MeanOver(1, 2),
                linear(3, 3),
            )
        ),
        (2, 2, 3),
        shared=True,
    ),
    Case(
        "layer-norm-token-outputs",
        shaken(
            sequential(linear(4, 4), later(nn.LayerNorm, 4), nn.Tanh, linear(4, 3), ChannelsFirst)
        ),
        (3, 4),
        (3, 3),
        shared=True,
    ),
    Case(
        "layer-norm-time-first",
        shaken(
            sequential(
                SwapFirst, linear(4, 4), later(nn.LayerNorm, 4), nn.Tanh, lambda: MeanOver(0)
            )
        ),
        (3, 4),
        (4,),
        shared=True,
    ),
    Case(
        "layer-norm-merged-rows",
        shaken(
            sequential(
                lambda: nn.Flatten(0, 1),
                later(nn.LayerNorm, 4),
                linear(4, 3),
                nn.Tanh,
                lambda: nn.Unflatten(0, (-1, 3)),
                lambda: MeanOver(1),
            )
        ),
        (3, 4),
        shared=True,
    ),
    Case(
        "layer-norm-twice",
        shaken(sequential(lambda: Twice(nn.LayerNorm(4)), linear(4, 3))),
        (4,),
    ),
    Case(
        "rms-norm",
        shaken(
            sequential(
                linear(4, 5), later(nn.RMSNorm, 5), nn.Tanh, lambda: MeanOver(1), linear(5, 3)
            )
        ),
        (3, 4),
        shared=True,
    ),
    Case(
        "rms-norm-2d",
        shaken(sequential(later(nn.RMSNorm, (2, 3), eps=1e-3), nn.Flatten, nn.Tanh, linear(6, 3))),
        (2, 3),
    ),
    Case(
        "group-norm",
        shaken(
            sequential(
                later(nn.Conv2d, 2, 4, 2),
                later(nn.GroupNorm, 2, 4),
                nn.Tanh,
                nn.Flatten,
                linear(16, 3),
            )
        ),
        (2, 3, 3),
        shared=True,
    ),
    Case(
        "group-norm-no-positions",
        shaken(sequential(linear(4, 6), later(nn.GroupNorm, 2, 6), nn.Tanh, linear(6, 3))),
        (4,),
    ),
    Case(
        "instance-norm1d",
        shaken(
            sequential(
                later(nn.InstanceNorm1d, 3, affine=True),
                nn.Tanh,
                later(nn.Conv1d, 3, 2, 2),
                nn.Flatten,
                linear(6, 3),
            )
        ),
        (3, 4),
        shared=True,
    ),
    Case(
        "instance-norm2d",
        shaken(
            sequential(
                later(nn.Conv2d, 2, 3, 2),
                nn.Tanh,
                later(nn.InstanceNorm2d, 3, affine=True),
                nn.Flatten,
                linear(12, 3),
            )
        ),
        (2, 3, 3),
        shared=True,
    ),
    Case(
        "instance-norm2d-running-statistics",
        shaken(
            sequential(
                later(nn.Conv2d, 2, 3, 2),
                later(nn.InstanceNorm2d, 3, affine=True, track_running_stats=True),
                nn.Tanh,
                nn.Flatten,
                linear(12, 3),
            )
        ),
        (2, 3, 3),
        shared=True,
    ),
    Case(
        "batch-norm1d",
        shaken(sequential(linear(4, 5), later(nn.BatchNorm1d, 5), nn.Tanh, linear(5, 3))),
        (4,),
    ),
    Case(
        "batch-norm1d-positions",
        shaken(
            sequential(
                later(nn.Conv1d, 2, 3, 2),
                later(nn.BatchNorm1d, 3),
                nn.Tanh,
                nn.Flatten,
                linear(9, 3),
            )
        ),
        (2, 4),
        shared=True,
    ),
    Case(
        "batch-norm2d",
        shaken(
            sequential(
                later(nn.Conv2d, 2, 3, 2),
                later(nn.BatchNorm2d, 3),
                lambda: nn.ReLU(inplace=True),
                lambda: nn.Dropout(0.5),
                nn.Flatten,
                linear(12, 3),
            )
        ),
        (2, 3, 3),
        shared=True,
    ),
    Case(
        "norms-subset",
        shaken(
            sequential(
                later(nn.Conv2d, 2, 4, 2),
                later(nn.GroupNorm, 2, 4),
                nn.Tanh,
                later(nn.BatchNorm2d, 4),
                nn.Flatten,
                later(nn.LayerNorm, 16),
                linear(16, 3),
            )
        ),
        (2, 3, 3),
        shared=True,
        frozen=("1.weight", "6.weight"),
        left_out=("3.bias", "5.weight"),
    ),
)
