"""Transposed convolutions."""

from torch import nn

from tests.helpers.cases.case import Case
from tests.helpers.cases.modules import (
    MeanOver,
    Twice,
    later,
    linear,
    sequential,
)

TRANSPOSED_CONVOLUTIONS: tuple[Case, ...] = (
    Case(
        "conv-transpose1d-output-padding",
        sequential(
            later(nn.ConvTranspose1d, 2, 3, 3, stride=2, padding=1, output_padding=1),
            nn.Tanh,
            nn.Flatten,
            linear(18, 3),
        ),
        (2, 3),
        shared=True,
    ),
    Case(
        "conv-transpose1d-cropped",
        sequential(
            later(nn.ConvTranspose1d, 2, 3, 4, stride=3, padding=3),
            nn.Tanh,
            nn.Flatten,
            linear(21, 3),
        ),
        (2, 4),
        shared=True,
    ),
    Case(
        "conv-transpose1d-dilation-groups",
        sequential(
            later(nn.ConvTranspose1d, 4, 6, 2, dilation=2, groups=2),
            nn.Tanh,
            lambda: MeanOver(2),
            linear(6, 3),
        ),
        (4, 3),
        shared=True,
    ),
    Case(
        "conv-transpose1d-twice",
        sequential(lambda: Twice(nn.ConvTranspose1d(2, 2, 3, padding=1)), nn.Flatten, linear(6, 3)),
        (2, 3),
        shared=True,
    ),
    Case(
        "conv-transpose1d-merged-rows",
        sequential(
            lambda: nn.Flatten(0, 1),
            later(nn.ConvTranspose1d, 2, 3, 2),
            lambda: nn.ReLU(inplace=True),
            lambda: nn.Unflatten(0, (-1, 3)),
            lambda: MeanOver(1, 3),
            linear(3, 3),
        ),
        (3, 2, 2),
        shared=True,
    ),
    Case(
        "conv-transpose1d-one-position",
        sequential(later(nn.ConvTranspose1d, 3, 2, 3), nn.Tanh, nn.Flatten, linear(6, 3)),
        (3, 1),
    ),
    Case(
        "conv-transpose1d-linear",
        sequential(later(nn.ConvTranspose1d, 2, 3, 2, stride=2)),
        (2, 2),
        (3, 4),
        shared=True,
    ),
    Case(
        "conv-transpose2d-stride-groups",
        sequential(
            later(nn.ConvTranspose2d, 4, 4, (2, 3), stride=(2, 1), padding=(0, 1), groups=2),
            nn.Tanh,
            later(nn.Conv2d, 4, 2, 2),
            nn.Flatten,
            linear(12, 3),
        ),
        (4, 2, 3),
        shared=True,
        batch_sizes=(2, 2, 1),
    ),
    Case(
        "conv-transpose2d-depthwise",
        sequential(
            later(nn.ConvTranspose2d, 3, 6, 2, groups=3, bias=False),
            nn.Tanh,
            lambda: MeanOver(2, 3),
            linear(6, 3),
        ),
        (3, 2, 2),
        shared=True,
    ),
    Case(
        "conv-transpose2d-pixel-outputs",
        sequential(
            later(nn.Conv2d, 2, 3, 2), nn.Tanh, later(nn.ConvTranspose2d, 3, 2, 2, stride=2)
        ),
        (2, 2, 3),
        (2, 2, 4),
        shared=True,
    ),
    Case(
        "conv-transpose3d",
        sequential(
            later(
                nn.ConvTranspose3d,
                *(2, 2, 2),
                stride=(1, 2, 1),
                padding=(0, 1, 0),
                output_padding=(0, 1, 0),
                dilation=(2, 1, 1),
            ),
            nn.Tanh,
            lambda: MeanOver(2),
            nn.Flatten,
            linear(18, 3),
        ),
        (2, 2, 2, 2),
        shared=True,
    ),
    Case(
        "conv-transpose3d-groups",
        sequential(
            later(nn.ConvTranspose3d, 4, 2, (1, 2, 1), groups=2),
            nn.Tanh,
            nn.Flatten,
            linear(12, 3),
        ),
        (4, 1, 2, 2),
        shared=True,
    ),
    Case(
        "conv-transpose2d-subset",
        sequential(
            later(nn.ConvTranspose2d, 4, 4, 2, groups=2),
            nn.Tanh,
            later(nn.ConvTranspose2d, 4, 2, 2, stride=2),
            nn.Tanh,
            lambda: MeanOver(2, 3),
            linear(2, 3),
        ),
        (4, 2, 1),
        shared=True,
        frozen=("2.bias",),
        left_out=("0.weight",),
    ),
)
