"""What is measured in every row: one tiny problem or several, told apart by their labels."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from benchmarks.peers import models
from benchmarks.peers.models import LINEAR, Layers, Module, batch_norm, mean_over, twice
from benchmarks.peers.problem import DTYPE, Problem, Targets

# --------------------------------------------------------------------------- layers

FALL_BACK = {"rotate-ewc": {"unsupported": "diagonal"}}
OF_GRAPHS = {
    "curvlinops-for-pytorch": {"batch_size_fn": lambda batch: len(batch["sizes"])},
    "laplace-torch": {"dict_key_x": "sizes"},
}
FROZEN = ("2.weight", "2.bias", "5.weight", "5.bias")
OF_ENCODER = ("0.linear1", "0.linear2")
OF_DECODER = ("0.layer.linear1", "0.layer.linear2")


def tracked(*modules: str) -> dict[str, dict[str, list[str]]]:
    """Modules for kronfluence, which by itself trips over the output layer of attention."""
    return {"kronfluence": {"modules": list(modules)}}


BATCH_NORM = partial(batch_norm, nn.BatchNorm1d, 4)
TWICE_LINEAR = twice(partial(nn.Linear, 4, 4), partial(nn.Linear, 4, 3))
TWICE_CONVOLUTION = twice(
    partial(nn.Conv2d, 2, 2, 3, padding=1), mean_over(2, 3), partial(nn.Linear, 2, 3)
)
TIME_FIRST = models.ATTENTION_TIME_FIRST
SWAP, BAG = models.SWAP_FIRST, partial(nn.EmbeddingBag, 6, 4, mode="sum")
ENCODER = partial(nn.TransformerEncoderLayer, 4, 2, 6, dropout=0.0, batch_first=True)
AFTER_TOKEN = (models.TOKEN_BEFORE, models.MIX, partial(nn.Linear, 4, 4))


def with_head(
    width: int, *modules: Module, axes: tuple[int, ...] = (), activate: bool = True
) -> Layers:
    """Modules, the activation, the mean over positions, and a Linear of so many features."""
    return lambda act: [
        *(module() for module in modules),
        *([act()] if activate else []),
        *([mean_over(*axes)()] if axes else []),
        nn.Linear(width, 3),
    ]


def stack(
    shape: tuple[int, ...],
    *modules: Module,
    axes: tuple[int, ...] = (),
    width: int = 4,
    activate: bool = True,
    **options: Any,
) -> Problem:
    """A problem with the layers of :func:`with_head`."""
    return Problem(with_head(width, *modules, axes=axes, activate=activate), shape, **options)


def convolution(
    kind: Callable[..., nn.Module],
    channels: tuple[int, int],
    kernel: Any,
    size: tuple[int, ...],
    label: str = "",
    **options: Any,
) -> Problem:
    """A convolution, the activation, the mean over positions and a Linear."""
    axes, made = tuple(range(2, 2 + len(size))), partial(kind, *channels, kernel, **options)
    shape = (channels[0], *size)
    return stack(shape, made, axes=axes, width=channels[1], label=label, separable=True)


def normed(norm: Module, label: str = "") -> Problem:
    """A Linear, a norm of four channels, the activation and a Linear."""
    return stack((5,), LINEAR, norm, label=label)


def normed_images(norm: Module, label: str = "") -> Problem:
    """The same with a convolution."""
    # Some norms take a bias away again, and its matrix of zeros has nothing to compare.
    convolved = partial(nn.Conv2d, 2, 4, 2, bias=False)
    return stack((2, 4, 4), convolved, norm, axes=(2, 3), label=label)


def tokens(shape: tuple[int, int], label: str, *modules: Module, **options: Any) -> Problem:
    """Modules with activations of their own, the mean over tokens and a Linear."""
    return stack(shape, *modules, axes=(1,), activate=False, label=label, **options)


ragged = partial(stack, (4, 5), models.SUMMED_ROWS, separable=True)
LAYERS: dict[str, tuple[Problem, ...]] = {
    "linear": (stack((5,), LINEAR, separable=True),),
    "linear-leading-axes": tuple(
        stack(shape, partial(nn.Linear, 4, 5), axes=axes, width=5, label=label, separable=True)
        for label, axes, shape in (("one", (1,), (3, 4)), ("two", (1, 2), (2, 2, 4)))
    ),
    "linear-time-first": (
        stack((4, 4), SWAP, partial(nn.Linear, 4, 5), axes=(0,), width=5, separable=True),
    ),
    "conv1d": (convolution(nn.Conv1d, (2, 4), 3, (9,), stride=2, dilation=2, padding=2),),
    "conv2d": (
        convolution(nn.Conv2d, (2, 4), (3, 2), (6, 5), stride=(1, 2), dilation=2, padding=1),
    ),
    "conv3d": (
        convolution(
            nn.Conv3d, (2, 3), 2, (4, 3, 3), stride=(2, 1, 1), dilation=(1, 2, 1), padding=1
        ),
    ),
    "groups": (
        convolution(nn.Conv1d, (4, 4), 2, (4,), "1d", groups=2),
        convolution(nn.Conv2d, (4, 4), 2, (3, 3), "2d", groups=2),
        convolution(nn.Conv2d, (3, 6), 2, (3, 3), "depthwise", groups=3),
    ),
    "padding-mode": tuple(
        convolution(nn.Conv2d, (2, 3), (3, 2), (4, 3), mode, padding=(2, 1), padding_mode=mode)
        for mode in ("circular", "reflect", "replicate")
    ),
    "padding-same": (
        convolution(nn.Conv2d, (2, 3), 3, (4, 3), "odd kernel", padding="same"),
        convolution(nn.Conv2d, (2, 3), (2, 4), (4, 5), "even kernel", padding="same"),
    ),
    "conv-transpose": (
        convolution(nn.ConvTranspose1d, (3, 4), 3, (4,), "1d", stride=2, padding=1),
        convolution(nn.ConvTranspose2d, (3, 2), (3, 2), (3, 2), "2d", stride=2, padding=1),
        convolution(nn.ConvTranspose2d, (4, 4), 2, (2, 2), "2d with groups", groups=2),
        convolution(nn.ConvTranspose3d, (2, 2), 2, (2, 2, 2), "3d", stride=2),
    ),
    "embedding": (stack((3,), partial(nn.Embedding, 6, 4), axes=(1,), vocabulary=6),),
    "embedding-tied": (Problem(models.tied_embedding, (3,), vocabulary=5, output_shape=(5,)),),
    "embedding-positions": (stack((3, 4), models.POSITIONAL, axes=(1,)),),
    **{
        name: (
            normed(partial(norm, 4), "[N, d]"),
            stack((3, 5), LINEAR, partial(norm, 4), axes=(1,), label="[N, T, d]"),
        )
        for name, norm in (("layer-norm", nn.LayerNorm), ("rms-norm", nn.RMSNorm))
    },
    "group-norm": (normed_images(partial(nn.GroupNorm, 2, 4)),),
    "instance-norm": (
        stack((4, 5), LINEAR, partial(nn.InstanceNorm1d, 4, affine=True), axes=(2,), label="1d"),
        normed_images(partial(nn.InstanceNorm2d, 4, affine=True), "2d"),
    ),
    "batch-norm": (
        normed(BATCH_NORM, "1d"),
        normed_images(partial(batch_norm, nn.BatchNorm2d, 4), "2d"),
    ),
    "attention": (
        tokens((3, 4), "batch first", models.ATTENTION, settings=tracked("2")),
        tokens((3, 4), "time first", SWAP, TIME_FIRST, SWAP, settings=tracked("4")),
        tokens((3, 3), "cross", models.CROSS_ATTENTION, settings=tracked("0.query", "2")),
    ),
    "transformer": (
        tokens((3, 4), "encoder", ENCODER, settings=tracked(*OF_ENCODER, "2")),
        tokens((3, 4), "decoder", models.DECODER, settings=tracked(*OF_DECODER, "2")),
    ),
    "called-twice": (
        Problem(TWICE_LINEAR, (4,), "`Linear`", shared=True),
        Problem(TWICE_CONVOLUTION, (2, 3, 3), "`Conv2d`", shared=True),
    ),
    "tied": (Problem(models.tied_linears, (4,)),),
    "in-place": (
        stack((5,), LINEAR, partial(nn.ReLU, inplace=True), activate=False, separable=True),
    ),
    "parametrized": (stack((5,), lambda: weight_norm(nn.Linear(5, 4))),),
    "functional": (
        stack((5,), models.FUNCTIONAL_LINEAR, label="`F.linear`", separable=True),
        stack((5,), models.PRODUCT, label="`@`", separable=True),
    ),
    "elementwise": (normed(models.SCALE_SHIFT),),
    "concatenated": (
        stack((3, 4), *AFTER_TOKEN, axes=(1,), label="class token"),
        stack((3, 4), *AFTER_TOKEN, axes=(1,), label="prompt, the rest frozen", left_out=FROZEN),
    ),
    "indexed": (stack((3, 5), LINEAR, models.RELATIVE_BIAS, axes=(1,)),),
    "ragged": (
        ragged(label="padding removed"),
        ragged(label="graphs", form=models.as_graphs, settings=OF_GRAPHS),
    ),
    "routed": (
        stack((4,), models.experts, label="[N, d]"),
        stack((4, 4), models.experts, axes=(1,), label="[N, T, d]"),
    ),
    "sorted": (
        stack((5,), models.SORTED_ROWS, label="[N, d]", separable=True),
        stack((4, 5), models.SORTED_ROWS, axes=(1,), label="[N, T, d]", separable=True),
    ),
    "sparse": (
        stack((5,), LINEAR, models.NEIGHBOURS, label="features"),
        stack((4, 5), LINEAR, models.NEIGHBOURS, axes=(1,), label="nodes"),
        stack((5,), LINEAR, form=Tensor.to_sparse, label="inputs", separable=True),
    ),
    "unknown": (
        tokens((3, 3), "`LSTM`", models.LSTM, settings=FALL_BACK),
        stack((3,), BAG, vocabulary=6, label="`EmbeddingBag`", settings=FALL_BACK),
    ),
}

# --------------------------------------------------------------------------- losses

CE, MSE, BCE = nn.CrossEntropyLoss, nn.MSELoss, nn.BCEWithLogitsLoss
WEIGHTS = torch.tensor([0.3, 1.0, 2.5], dtype=DTYPE)

TWO_LINEARS = with_head(4, LINEAR)
PLAIN = Problem(TWO_LINEARS, (5,), separable=True)
DEEP = dataclasses.replace(
    PLAIN, layers=lambda act: [nn.Linear(5, 4), act(), nn.Linear(4, 4), act(), nn.Linear(4, 3)]
)


def loss(kind: Callable[..., nn.Module], **options: Any) -> Callable[[str], nn.Module]:
    """A loss with its options, from its reduction."""
    return lambda reduction: kind(reduction=reduction, **options)


def on_mlp(
    kind: Callable[..., nn.Module],
    targets: Targets,
    label: str = "",
    *,
    separable: bool = False,
    reduction: str = "mean",
    **options: Any,
) -> Problem:
    """A loss on three outputs of a small network."""
    made = Problem(TWO_LINEARS, (5,), label, separable=separable, reduction=reduction)
    return dataclasses.replace(made, loss=loss(kind, **options), targets=targets)


def on_tokens(
    output_shape: tuple[int, ...], *last: Module, label: str = "", **options: Any
) -> Problem:
    """A loss on outputs ``[N, T, C]`` of four tokens that have seen each other, and the last."""

    def layers(act: Module) -> list[nn.Module]:
        first = [nn.Linear(4, 5), models.MIX(), act(), nn.Linear(5, 3)]
        return [*first, *(module() for module in last)]

    return Problem(layers, (4, 4), label, output_shape=output_shape, **options)


LOSSES: dict[str, tuple[Problem, ...]] = {
    "cross-entropy": (on_mlp(CE, "classes", separable=True),),
    "mse": (on_mlp(MSE, "numbers", separable=True),),
    "bce": (on_mlp(BCE, "bits"),),
    "sum": (
        on_mlp(CE, "classes", "cross-entropy", separable=True, reduction="sum"),
        on_mlp(MSE, "numbers", "squared error", separable=True, reduction="sum"),
    ),
    "class-weights": (on_mlp(CE, "classes", weight=WEIGHTS),),
    "ignore-index": (on_mlp(CE, "some ignored"),),
    "label-smoothing": (on_mlp(CE, "classes", label_smoothing=0.2),),
    "soft-targets": (on_mlp(CE, "probabilities"),),
    "options-together": (on_mlp(CE, "some ignored", weight=WEIGHTS, label_smoothing=0.2),),
    "pos-weight": (on_mlp(BCE, "bits", pos_weight=WEIGHTS),),
    "bce-weight": (on_mlp(BCE, "bits", weight=WEIGHTS),),
    "tokens": (on_tokens((3, 4), models.SWAP_LAST),),
    "tokens-flattened": (on_tokens((3,), partial(nn.Flatten, 0, 1), rows=4),),
    "tokens-regression": (
        on_tokens((4, 3), label="squared error", targets="numbers", loss=loss(MSE)),
        on_tokens((4, 3), label="BCE", targets="bits", loss=loss(BCE)),
    ),
    "reduction-none": (on_mlp(CE, "classes", reduction="none"),),
}

# --------------------------------------------------------------------------- data and state

DATA: dict[str, tuple[Problem, ...]] = {
    "uneven-batches": (dataclasses.replace(PLAIN, examples=7),),
    "drop-last": (dataclasses.replace(PLAIN, examples=7, drop_last=True),),
    "one-shot": (dataclasses.replace(PLAIN, one_shot=True),),
    "subset-layers": (dataclasses.replace(DEEP, left_out=("0.weight", "0.bias")),),
    "subset-weight": (dataclasses.replace(DEEP, left_out=("2.bias",)),),
    "training-mode": (
        dataclasses.replace(
            PLAIN,
            layers=lambda act: [nn.Linear(5, 4), act(), nn.Dropout(0.5), nn.Linear(4, 3)],
            label="dropout",
            training=True,
        ),
        dataclasses.replace(
            PLAIN,
            layers=with_head(4, LINEAR, BATCH_NORM),
            label="`BatchNorm1d`",
            training=True,
            left_out=("1.weight", "1.bias"),
        ),
    ),
    "as-found": (DEEP,),
    "pickle": (PLAIN,),
    "weights": (PLAIN,),
}
PROBLEMS = {**LAYERS, **LOSSES, **DATA}
