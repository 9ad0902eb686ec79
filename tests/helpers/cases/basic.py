"""Linear layers and convolutions, and every way of sharing their weights.

No case has a factor with repeated eigenvalues by construction (a circular convolution whose kernel
spans its input has), since an operator is then only one of many equally good ones.
"""

from torch import nn

from tests.helpers.cases.case import Case
from tests.helpers.cases.modules import (
    BothWays,
    ByHand,
    ChannelsFirst,
    First,
    MeanOver,
    Residual,
    SwapFirst,
    Twice,
    later,
    linear,
    sequential,
)


def tied() -> nn.Module:
    """Two Linear modules that own the same weight."""
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), second, nn.Linear(4, 3))


def batch_norm_net() -> nn.Module:
    """A small network with BatchNorm and Dropout, with statistics worth having."""
    norm = nn.BatchNorm2d(3)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    nn.init.uniform_(norm.running_mean, -1, 0)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    nn.init.uniform_(norm.weight, 0.5, 2)
    return nn.Sequential(
        nn.Conv2d(2, 3, 2),
        norm,
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(12, 3),
    )


BASIC: tuple[Case, ...] = (
    # fully connected
    Case("single-linear", sequential(linear(4, 3)), (4,)),
    Case("tanh-mlp", sequential(linear(5, 4), nn.Tanh, linear(4, 3)), (5,), batch_sizes=(2, 4, 1)),
    Case(
        "inplace-relu-mlp",
        sequential(
            linear(4, 6),
            lambda: nn.ReLU(inplace=True),
            linear(6, 5),
            lambda: nn.ReLU(inplace=True),
            linear(5, 3),
        ),
        (4,),
    ),
    Case("deep-linear", sequential(linear(4, 5), linear(5, 4), linear(4, 3)), (4,)),
    Case(
        "no-bias-mlp",
        sequential(linear(5, 6, False), nn.Tanh, linear(6, 3, False)),
        (5,),
        batch_sizes=(4, 1),
    ),
    Case(
        "residual-mlp",
        sequential(linear(4, 5), lambda: Residual(nn.Linear(5, 5)), linear(5, 2)),
        (4,),
        (2,),
    ),
    Case(
        "subset-of-parameters",
        sequential(
            linear(4, 4), nn.Tanh, linear(4, 5), nn.Tanh, linear(5, 4), nn.Tanh, linear(4, 3)
        ),
        (4,),
        frozen=("0.weight", "0.bias", "4.weight"),
        left_out=("2.bias",),
    ),
    # shared positions
    Case(
        "pooled-tokens",
        sequential(linear(4, 5), nn.Tanh, linear(5, 3), lambda: MeanOver(1)),
        (3, 4),
        shared=True,
    ),
    Case(
        "pooled-grid",
        sequential(linear(3, 4), nn.Tanh, linear(4, 3), lambda: MeanOver(1, 2)),
        (2, 3, 3),
        shared=True,
    ),
    Case(
        "pooled-linear",
        sequential(linear(4, 5), linear(5, 3), lambda: MeanOver(1)),
        (3, 4),
        shared=True,
    ),
    Case(
        "sequence-outputs",
        sequential(linear(4, 5), nn.Tanh, linear(5, 3), ChannelsFirst),
        (2, 4),
        (3, 2),
        shared=True,
    ),
    Case(
        "sequence-linear",
        sequential(linear(4, 5), linear(5, 3), ChannelsFirst),
        (3, 4),
        (3, 3),
        shared=True,
    ),
    Case(
        "wide-few-positions",
        sequential(linear(12, 12), nn.Tanh, lambda: MeanOver(1), linear(12, 3)),
        (2, 12),
        shared=True,
    ),
    Case(
        "flattened-sequence-outputs",
        sequential(linear(4, 5), nn.Tanh, linear(5, 3), lambda: nn.Flatten(0, 1)),
        (2, 4),
        rows=2,
        shared=True,
    ),
    Case(
        "merged-rows",
        sequential(
            lambda: nn.Flatten(0, 1),
            linear(4, 5),
            lambda: nn.ReLU(inplace=True),
            lambda: nn.Unflatten(0, (-1, 3)),
            lambda: MeanOver(1),
            linear(5, 3),
        ),
        (3, 4),
        shared=True,
    ),
    Case(
        "time-first-mean",
        sequential(SwapFirst, linear(4, 5), nn.Tanh, linear(5, 3), lambda: MeanOver(0)),
        (3, 4),
        shared=True,
    ),
    Case(
        "time-first-leading-token",
        sequential(SwapFirst, linear(4, 5), nn.Tanh, First, linear(5, 3)),
        (3, 4),
        shared=True,
    ),
    # one weight, several uses
    Case(
        "linear-twice",
        sequential(lambda: Twice(nn.Linear(5, 5)), linear(5, 3)),
        (5,),
        shared=True,
    ),
    Case(
        "conv-twice",
        sequential(
            lambda: Twice(nn.Conv2d(2, 2, 3, padding=1)), lambda: MeanOver(2, 3), linear(2, 3)
        ),
        (2, 3, 3),
        shared=True,
    ),
    Case("tied-weights", tied, (4,), shared=True),
    Case(
        "recurrent-by-hand",
        lambda: ByHand(3, 3),
        (3, 3),
        shared=True,
    ),
    Case(
        "linear-both-ways",
        sequential(lambda: BothWays(nn.Linear(4, 4)), lambda: MeanOver(1), linear(4, 3)),
        (3, 4),
        shared=True,
    ),
    # convolutions
    Case(
        "conv1d-stride-dilation",
        sequential(
            later(nn.Conv1d, 2, 4, 3, stride=2, dilation=2, padding=2),
            nn.Tanh,
            nn.Flatten,
            linear(16, 3),
        ),
        (2, 7),
        shared=True,
    ),
    Case(
        "conv1d-groups-reflect",
        sequential(
            later(nn.Conv1d, 4, 6, 3, groups=2, padding=2, padding_mode="reflect"),
            nn.Tanh,
            lambda: MeanOver(2),
            linear(6, 3),
        ),
        (4, 4),
        shared=True,
    ),
    Case(
        "conv2d-stride-groups",
        sequential(
            later(nn.Conv2d, 2, 4, 3, stride=2, padding=1, groups=2),
            nn.Tanh,
            nn.Flatten,
            linear(36, 3),
        ),
        (2, 5, 5),
        shared=True,
        batch_sizes=(2, 2, 1),
    ),
    Case(
        "conv2d-depthwise",
        sequential(
            later(nn.Conv2d, 3, 6, 2, groups=3, bias=False),
            nn.Tanh,
            later(nn.Conv2d, 6, 4, 1),
            nn.Tanh,
            lambda: MeanOver(2, 3),
            linear(4, 3),
        ),
        (3, 3, 3),
        shared=True,
    ),
    Case(
        "conv2d-same-even-kernel",
        sequential(
            later(nn.Conv2d, 2, 3, (2, 4), padding="same"),
            nn.Tanh,
            lambda: MeanOver(2, 3),
            linear(3, 3),
        ),
        (2, 4, 5),
        shared=True,
    ),
    Case(
        "conv2d-same-even-kernel-circular",
        sequential(
            later(nn.Conv2d, 2, 3, (4, 2), padding="same", padding_mode="circular"),
            nn.Tanh,
            later(nn.Conv2d, 3, 2, 2, padding="same", dilation=2),
            nn.Tanh,
            nn.Flatten,
            linear(30, 3),
        ),
        (2, 5, 3),
        shared=True,
    ),
    *(
        Case(
            f"conv2d-{mode}",
            sequential(
                later(nn.Conv2d, 2, 3, (3, 2), padding=(2, 1), stride=(1, 2), padding_mode=mode),
                nn.Tanh,
                nn.Flatten,
                linear(30, 3),
            ),
            (2, 3, 3),
            shared=True,
        )
        for mode in ("zeros", "circular", "reflect", "replicate")
    ),
    Case(
        "conv2d-one-position",
        sequential(later(nn.Conv2d, 2, 4, 3), nn.Tanh, nn.Flatten, linear(4, 3)),
        (2, 3, 3),
    ),
    Case(
        "conv2d-sequence-outputs",
        sequential(later(nn.Conv2d, 2, 3, 2), nn.Tanh, later(nn.Conv2d, 3, 2, 1)),
        (2, 3, 3),
        (2, 2, 2),
        shared=True,
        batch_sizes=(4, 2),
    ),
    Case(
        "conv3d",
        sequential(
            later(nn.Conv3d, 2, 2, 2, stride=(1, 1, 2), groups=2, padding=(0, 0, 1)),
            nn.Tanh,
            nn.Flatten,
            linear(16, 3),
        ),
        (2, 3, 3, 2),
        shared=True,
    ),
    Case(
        "batch-norm-and-dropout",
        batch_norm_net,
        (2, 3, 3),
        shared=True,
        left_out=("1.weight", "1.bias"),
    ),
)

# Softmax over its positions instead of its features would leave the last bias without a gradient.
FEATURES_LAST = Case(
    "sequence-features",
    sequential(linear(4, 5), nn.Tanh, linear(5, 3)),
    (2, 4),
    (2, 3),
    shared=True,
)
