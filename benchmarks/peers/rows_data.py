"""Batches, subsets of parameters, the state, and the model after estimation."""

import dataclasses

from torch import nn

from benchmarks.peers.models import batch_norm, linear, made, stack
from benchmarks.peers.problem import Problem
from benchmarks.peers.row import Row, Section

PLAIN = Problem(stack(linear(5, 4), None, linear(4, 3)), (5,), separable=True)
DEEP = Problem(stack(linear(5, 4), None, linear(4, 4), None, linear(4, 3)), (5,), separable=True)


DATA = Section(
    "Data and parameters",
    (
        Row(
            "uneven-batches",
            "a last batch that is not full",
            (dataclasses.replace(PLAIN, examples=7, batch_size=3),),
        ),
        Row(
            "drop-last",
            "a loader with `drop_last`",
            (dataclasses.replace(PLAIN, examples=7, batch_size=3, drop_last=True),),
        ),
        Row(
            "one-shot",
            "data that can be gone through only once: used, or refused by name",
            (dataclasses.replace(PLAIN, one_shot=True),),
        ),
        Row(
            "subset-layers",
            "only some layers",
            (dataclasses.replace(DEEP, left_out=("0.weight", "0.bias")),),
        ),
        Row(
            "subset-weight",
            "a weight without its bias",
            (dataclasses.replace(DEEP, left_out=("2.bias",)),),
        ),
        Row(
            "training-mode",
            "a model in training mode: estimated in evaluation mode, or refused",
            (
                Problem(
                    stack(linear(5, 4), None, made(nn.Dropout, 0.5), linear(4, 3)),
                    (5,),
                    "dropout",
                    training=True,
                    separable=True,
                ),
                Problem(
                    stack(
                        linear(5, 4),
                        batch_norm(nn.BatchNorm1d, 4),
                        None,
                        linear(4, 3),
                    ),
                    (5,),
                    "`BatchNorm1d`",
                    training=True,
                    left_out=("1.weight", "1.bias"),
                    separable=True,
                ),
            ),
        ),
        Row(
            "as-found",
            "the model is left as it was found",
            (DEEP,),
            question="as found",
        ),
    ),
)
STATE = Section(
    "State",
    (
        Row("pickle", "saved and read without pickle", (PLAIN,), question="pickle"),
        Row("weights", "loading leaves the model's weights alone", (PLAIN,), question="weights"),
    ),
)
