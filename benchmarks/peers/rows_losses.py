"""Losses and their options."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.peers.models import Mix, Swap, linear, made, stack
from benchmarks.peers.problem import DTYPE, Problem, Targets
from benchmarks.peers.row import Row, Section

CLASS_WEIGHTS = torch.tensor([0.3, 1.0, 2.5], dtype=DTYPE)
MLP = stack(linear(5, 4), None, linear(4, 3))


def loss(kind: Callable[..., nn.Module], **options: Any) -> Callable[[str], nn.Module]:
    """A loss with its options, from its reduction."""
    return lambda reduction: kind(reduction=reduction, **options)


CE, MSE, BCE = nn.CrossEntropyLoss, nn.MSELoss, nn.BCEWithLogitsLoss


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
    return Problem(
        MLP,
        (5,),
        label,
        loss=loss(kind, **options),
        targets=targets,
        separable=separable,
        reduction=reduction,
    )


def on_tokens(label: str = "", *, layout: str, targets: Targets, **options: Any) -> Problem:
    """A loss on the outputs of four tokens that have seen each other.

    Args:
        label: Of the problem.
        layout: ``"NCT"``, ``"NTC"`` or ``"rows"`` for ``[N * T, C]``.
        targets: Kind of targets.
        **options: Further fields of the problem.
    """
    last = {"NCT": [made(Swap, 1, 2)], "NTC": [], "rows": [made(nn.Flatten, 0, 1)]}[layout]
    shape = {"NCT": (3, 4), "NTC": (4, 3), "rows": (3,)}[layout]
    return Problem(
        stack(linear(4, 5), made(Mix), None, linear(5, 3), *last),
        (4, 4),
        label,
        output_shape=shape,
        rows=4 if layout == "rows" else 1,
        targets=targets,
        **options,
    )


LOSSES = Section(
    "Losses",
    (
        Row("cross-entropy", "`CrossEntropyLoss`", (on_mlp(CE, "classes", separable=True),)),
        Row("mse", "`MSELoss`", (on_mlp(MSE, "numbers", separable=True),)),
        Row("bce", "`BCEWithLogitsLoss`", (on_mlp(BCE, "bits"),)),
        Row(
            "sum",
            'reduction `"sum"`',
            (
                on_mlp(CE, "classes", "cross-entropy", separable=True, reduction="sum"),
                on_mlp(MSE, "numbers", "squared error", separable=True, reduction="sum"),
            ),
        ),
        Row("class-weights", "class weights", (on_mlp(CE, "classes", weight=CLASS_WEIGHTS),)),
        Row(
            "ignore-index",
            "`ignore_index`",
            (on_mlp(CE, "some ignored"),),
        ),
        Row("label-smoothing", "label smoothing", (on_mlp(CE, "classes", label_smoothing=0.2),)),
        Row("soft-targets", "class probabilities as targets", (on_mlp(CE, "probabilities"),)),
        Row(
            "options-together",
            "class weights, `ignore_index` and label smoothing together",
            (on_mlp(CE, "some ignored", weight=CLASS_WEIGHTS, label_smoothing=0.2),),
        ),
        Row("pos-weight", "`pos_weight`", (on_mlp(BCE, "bits", pos_weight=CLASS_WEIGHTS),)),
        Row(
            "bce-weight",
            "`weight` of `BCEWithLogitsLoss`",
            (on_mlp(BCE, "bits", weight=CLASS_WEIGHTS),),
        ),
        Row(
            "tokens",
            "a label for every token, outputs `[N, C, T]`",
            (on_tokens(layout="NCT", targets="classes"),),
        ),
        Row(
            "tokens-flattened",
            "the same flattened to `[N * T, C]`",
            (on_tokens(layout="rows", targets="classes"),),
        ),
        Row(
            "tokens-regression",
            "`MSELoss` and `BCEWithLogitsLoss` on `[N, T, C]`",
            (
                on_tokens("squared error", layout="NTC", targets="numbers", loss=loss(MSE)),
                on_tokens("BCE", layout="NTC", targets="bits", loss=loss(BCE)),
            ),
        ),
        Row(
            "reduction-none",
            'reduction `"none"` is refused by name',
            (on_mlp(CE, "classes", reduction="none"),),
            question="reduction",
        ),
    ),
)
