"""Layers, and ways of using them."""

from collections.abc import Callable
from typing import Any

from torch import nn

from benchmarks.peers.models import (
    CrossAttention,
    Decoder,
    Functional,
    MeanOver,
    Part,
    PositionalEmbedding,
    Product,
    ScaleShift,
    Swap,
    Twice,
    batch_norm,
    linear,
    made,
    stack,
    tied_embedding,
    tied_linears,
    weight_normed,
)
from benchmarks.peers.problem import Problem
from benchmarks.peers.row import Row, Section

FALL_BACK = {"rotate-ewc": {"unsupported": "diagonal"}}


def convolution(
    kind: Callable[..., nn.Module],
    channels: tuple[int, int],
    kernel: Any,
    size: tuple[int, ...],
    label: str = "",
    **options: Any,
) -> Problem:
    """A convolution, the activation, the mean over positions and a Linear."""
    model = stack(
        made(kind, *channels, kernel, **options),
        None,
        made(MeanOver, *range(2, 2 + len(size))),
        linear(channels[1], 3),
    )
    return Problem(model, (channels[0], *size), label, separable=True)


LINEAR = (
    Row(
        "linear",
        "`Linear`",
        (Problem(stack(linear(5, 4), None, linear(4, 3)), (5,), separable=True),),
    ),
    Row(
        "linear-leading-axes",
        "`Linear` with more leading axes (tokens, pixels)",
        (
            Problem(
                stack(linear(4, 5), None, made(MeanOver, 1), linear(5, 3)),
                (3, 4),
                "one",
                separable=True,
            ),
            Problem(
                stack(linear(4, 5), None, made(MeanOver, 1, 2), linear(5, 3)),
                (2, 2, 4),
                "two",
                separable=True,
            ),
        ),
    ),
    Row(
        "linear-time-first",
        "`Linear` on `[T, N, d]`, time first",
        (
            Problem(
                stack(made(Swap, 0, 1), linear(4, 5), None, made(MeanOver, 0), linear(5, 3)),
                (4, 4),
                separable=True,
            ),
        ),
    ),
)
CONVOLUTIONS = (
    Row(
        "conv1d",
        "`Conv1d` with stride and dilation",
        (convolution(nn.Conv1d, (2, 4), 3, (9,), stride=2, dilation=2, padding=2),),
    ),
    Row(
        "conv2d",
        "`Conv2d` with stride and dilation",
        (convolution(nn.Conv2d, (2, 4), (3, 2), (6, 5), stride=(1, 2), dilation=2, padding=1),),
    ),
    Row(
        "conv3d",
        "`Conv3d` with stride and dilation",
        (
            convolution(
                nn.Conv3d, (2, 3), 2, (4, 3, 3), stride=(2, 1, 1), dilation=(1, 2, 1), padding=1
            ),
        ),
    ),
    Row(
        "groups",
        "convolution with groups",
        (
            convolution(nn.Conv1d, (4, 4), 2, (4,), "1d", groups=2),
            convolution(nn.Conv2d, (4, 4), 2, (3, 3), "2d", groups=2),
            convolution(nn.Conv2d, (3, 6), 2, (3, 3), "depthwise", groups=3),
        ),
    ),
    Row(
        "padding-mode",
        "`padding_mode` circular, reflect, replicate",
        tuple(
            convolution(nn.Conv2d, (2, 3), (3, 2), (4, 3), mode, padding=(2, 1), padding_mode=mode)
            for mode in ("circular", "reflect", "replicate")
        ),
    ),
    Row(
        "padding-same",
        '`padding="same"`',
        (
            convolution(nn.Conv2d, (2, 3), 3, (4, 3), "odd kernel", padding="same"),
            convolution(nn.Conv2d, (2, 3), (2, 4), (4, 5), "even kernel", padding="same"),
        ),
    ),
    Row(
        "conv-transpose",
        "`ConvTranspose1d/2d/3d`",
        (
            convolution(nn.ConvTranspose1d, (3, 4), 3, (4,), "1d", stride=2, padding=1),
            convolution(nn.ConvTranspose2d, (3, 2), (3, 2), (3, 2), "2d", stride=2, padding=1),
            convolution(nn.ConvTranspose2d, (4, 4), 2, (2, 2), "2d with groups", groups=2),
            convolution(nn.ConvTranspose3d, (2, 2), 2, (2, 2, 2), "3d", stride=2),
        ),
    ),
)
EMBEDDINGS = (
    Row(
        "embedding",
        "`Embedding`",
        (
            Problem(
                stack(made(nn.Embedding, 6, 4), None, made(MeanOver, 1), linear(4, 3)),
                (3,),
                vocabulary=6,
            ),
        ),
    ),
    Row(
        "embedding-tied",
        "`Embedding` tied to the output `Linear`",
        (Problem(tied_embedding, (3,), vocabulary=5, output_shape=(5,)),),
    ),
    Row(
        "embedding-positions",
        "positional `Embedding` added to the tokens",
        (
            Problem(
                stack(made(PositionalEmbedding, 3, 4), None, made(MeanOver, 1), linear(4, 3)),
                (3, 4),
            ),
        ),
    ),
)


def normed(norm: Callable[[], nn.Module], label: str = "", *, spatial: bool = False) -> Problem:
    """A Linear or convolution, a norm of four channels, the activation and a Linear."""
    if not spatial:
        return Problem(stack(linear(5, 4), norm, None, linear(4, 3)), (5,), label)
    # Some norms take a bias away again, and its matrix of zeros has nothing to compare.
    conv = made(nn.Conv2d, 2, 4, 2, bias=False)
    model = stack(conv, norm, None, made(MeanOver, 2, 3), linear(4, 3))
    return Problem(model, (2, 4, 4), label)


def normed_tokens(norm: Callable[[], nn.Module], label: str) -> Problem:
    """The same on ``[N, T, d]``."""
    model = stack(linear(5, 4), norm, None, made(MeanOver, 1), linear(4, 3))
    return Problem(model, (3, 5), label)


LAYER_NORM, RMS_NORM = made(nn.LayerNorm, 4), made(nn.RMSNorm, 4)
NORMS = (
    Row(
        "layer-norm",
        "`LayerNorm`",
        (normed(LAYER_NORM, "[N, d]"), normed_tokens(LAYER_NORM, "[N, T, d]")),
    ),
    Row(
        "rms-norm", "`RMSNorm`", (normed(RMS_NORM, "[N, d]"), normed_tokens(RMS_NORM, "[N, T, d]"))
    ),
    Row("group-norm", "`GroupNorm`", (normed(made(nn.GroupNorm, 2, 4), spatial=True),)),
    Row(
        "instance-norm",
        "`InstanceNorm1d/2d` with `affine=True`",
        (
            Problem(
                stack(
                    linear(5, 4),
                    made(nn.InstanceNorm1d, 4, affine=True),
                    None,
                    made(MeanOver, 2),
                    linear(4, 3),
                ),
                (4, 5),
                "1d",
            ),
            normed(made(nn.InstanceNorm2d, 4, affine=True), "2d", spatial=True),
        ),
    ),
    Row(
        "batch-norm",
        "`BatchNorm1d/2d` in evaluation mode",
        (
            normed(batch_norm(nn.BatchNorm1d, 4), "1d"),
            normed(batch_norm(nn.BatchNorm2d, 4), "2d", spatial=True),
        ),
    ),
)


def attention(label: str, *, batch_first: bool) -> Problem:
    """Self-attention over three tokens, the mean over them and a Linear."""
    layer = nn.MultiheadAttention
    part = [made(lambda: Part(layer(4, 2, batch_first=batch_first), copies=3))]
    parts = part if batch_first else [made(Swap, 0, 1), *part, made(Swap, 0, 1)]
    model = stack(*parts, made(MeanOver, 1), linear(4, 3))
    last = str(len(parts) + 1)
    return Problem(model, (3, 4), label, settings=tracked(last))


def tracked(*modules: str) -> dict[str, dict[str, list[str]]]:
    """Modules for kronfluence, which by itself trips over the output layer of attention."""
    return {"kronfluence": {"modules": list(modules)}}


def transformer_encoder() -> nn.Module:
    """One layer, without dropout."""
    return nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)


ATTENTION = (
    Row(
        "attention",
        "`MultiheadAttention`",
        (
            attention("batch first", batch_first=True),
            attention("time first", batch_first=False),
            Problem(
                stack(made(CrossAttention, 4, 2, 3), made(MeanOver, 1), linear(4, 3)),
                (3, 3),
                "cross",
                settings=tracked("0.query", "2"),
            ),
        ),
    ),
    Row(
        "transformer",
        "`TransformerEncoderLayer`, `TransformerDecoderLayer`",
        (
            Problem(
                stack(transformer_encoder, made(MeanOver, 1), linear(4, 3)),
                (3, 4),
                "encoder",
                settings=tracked("0.linear1", "0.linear2", "2"),
            ),
            Problem(
                stack(made(Decoder, 4, 2, 5), made(MeanOver, 1), linear(4, 3)),
                (3, 4),
                "decoder",
                settings=tracked("0.layer.linear1", "0.layer.linear2", "2"),
            ),
        ),
    ),
)
USES = (
    Row(
        "called-twice",
        "a layer called twice",
        (
            Problem(
                lambda activation: nn.Sequential(
                    Twice(nn.Linear(4, 4), activation()), nn.Linear(4, 3)
                ),
                (4,),
                "`Linear`",
                shared=True,
            ),
            Problem(
                lambda activation: nn.Sequential(
                    Twice(nn.Conv2d(2, 2, 3, padding=1), activation()),
                    MeanOver(2, 3),
                    nn.Linear(2, 3),
                ),
                (2, 3, 3),
                "`Conv2d`",
                shared=True,
            ),
        ),
    ),
    Row("tied", "two layers that share a weight", (Problem(tied_linears, (4,)),)),
    Row(
        "in-place",
        "an in-place activation after the layer",
        (
            Problem(
                stack(linear(5, 4), made(nn.ReLU, inplace=True), linear(4, 3)),
                (5,),
                separable=True,
            ),
        ),
    ),
    Row(
        "parametrized",
        "`parametrizations.weight_norm`",
        (
            Problem(
                stack(weight_normed(linear(5, 4)), None, linear(4, 3)),
                (5,),
            ),
        ),
    ),
    Row(
        "functional",
        "a parameter in `F.linear(x, self.w)` or `x @ self.w`",
        (
            Problem(
                stack(made(Functional, 5, 4), None, linear(4, 3)),
                (5,),
                "`F.linear`",
                separable=True,
            ),
            Problem(stack(made(Product, 5, 4), None, linear(4, 3)), (5,), "`@`", separable=True),
        ),
    ),
    Row(
        "elementwise",
        "a parameter in `x * self.scale + self.shift`",
        (Problem(stack(linear(5, 4), made(ScaleShift, 4), None, linear(4, 3)), (5,)),),
    ),
    Row(
        "unknown",
        "layers without a rule (exact diagonal on request)",
        (
            Problem(
                stack(
                    made(lambda: Part(nn.LSTM(3, 4, batch_first=True))),
                    made(MeanOver, 1),
                    linear(4, 3),
                ),
                (3, 3),
                "`LSTM`",
                settings=FALL_BACK,
            ),
            Problem(
                stack(linear(5, 4), made(nn.PReLU, 4), linear(4, 3)),
                (5,),
                "`PReLU`",
                settings=FALL_BACK,
            ),
        ),
    ),
)

LAYERS = Section("Layers", (*LINEAR, *CONVOLUTIONS, *EMBEDDINGS, *NORMS, *ATTENTION))
WAYS_OF_USE = Section("Ways of using layers", USES)
