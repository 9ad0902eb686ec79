"""Modules whose weights are computed from other parameters."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

from tests.helpers.cases.case import Case, derived
from tests.helpers.cases.modules import (
    Build,
    MeanOver,
    later,
    linear,
    sequential,
)
from tests.helpers.oracles import BlockLayout


class Symmetric(nn.Module):
    """Make a square matrix symmetric."""

    def forward(self, w: Tensor) -> Tensor:
        """Mirror the upper triangle."""
        return w.triu() + w.triu(1).mT


class Positive(nn.Module):
    """Make every number positive."""

    def forward(self, w: Tensor) -> Tensor:
        """Apply the softplus."""
        return F.softplus(w)


def parametrized(build: Build, change: Callable[..., Any], *args: Any, **options: Any) -> Build:
    """Put off making a module with a parametrization."""

    def build_and_change() -> nn.Module:
        # In double precision from the start, since some parametrizations keep what they began with.
        module = build().double()
        change(module, *args, **options)
        return module

    return build_and_change


def pruned(build: Build) -> Build:
    """Put off making a module with a third of its weights pruned."""

    def build_and_prune() -> nn.Module:
        module = build().double()
        with torch.no_grad():  # a module with a weight attached to a graph cannot be copied
            prune.l1_unstructured(module, "weight", amount=0.3)
        return module

    return build_and_prune


def weight_of(layer: str, *names: str) -> tuple[BlockLayout, ...]:
    """Say that a layer's parametrized weight is derived from these parameters."""
    names = names or ("original",)
    return derived(*(f"{layer}.parametrizations.weight.{name}" for name in names))


PARAMETRIZED: tuple[Case, ...] = (
    Case(
        "weight-norm",
        sequential(parametrized(linear(4, 5), parametrizations.weight_norm), nn.Tanh, linear(5, 3)),
        (4,),
        layouts=weight_of("0", "original0", "original1"),
    ),
    Case(
        "weight-norm-conv",
        sequential(
            parametrized(later(nn.Conv1d, 2, 4, 2, groups=2), parametrizations.weight_norm),
            nn.Tanh,
            nn.Flatten,
            linear(8, 3),
        ),
        (2, 3),
        shared=True,
        layouts=weight_of("0", "original0", "original1"),
    ),
    Case(
        "weight-norm-conv-transpose",
        sequential(
            parametrized(later(nn.ConvTranspose1d, 2, 3, 2), parametrizations.weight_norm, dim=1),
            nn.Tanh,
            lambda: MeanOver(2),
            linear(3, 3),
        ),
        (2, 2),
        shared=True,
        layouts=weight_of("0", "original0", "original1"),
    ),
    Case(
        "spectral-norm",
        sequential(
            parametrized(linear(4, 5), parametrizations.spectral_norm), nn.Tanh, linear(5, 3)
        ),
        (4,),
        layouts=weight_of("0"),
    ),
    Case(
        "spectral-norm-conv",
        sequential(
            parametrized(later(nn.Conv2d, 2, 2, 2), parametrizations.spectral_norm),
            nn.Tanh,
            nn.Flatten,
            linear(4, 3),
        ),
        (2, 3, 2),
        shared=True,
        layouts=weight_of("0"),
    ),
    *(
        Case(
            f"orthogonal-{how}",
            sequential(
                parametrized(linear(4, 4), parametrizations.orthogonal, orthogonal_map=how),
                nn.Tanh,
                linear(4, 3),
            ),
            (4,),
            layouts=weight_of("0"),
        )
        for how in ("matrix_exp", "cayley")
    ),
    Case(
        "symmetric-tokens",
        sequential(
            parametrized(linear(4, 4), parametrize.register_parametrization, "weight", Symmetric()),
            nn.Tanh,
            lambda: MeanOver(1),
            linear(4, 3),
        ),
        (3, 4),
        shared=True,
        layouts=weight_of("0"),
    ),
    Case(
        "positive-embedding",
        sequential(
            parametrized(
                later(nn.Embedding, 4, 3),
                parametrize.register_parametrization,
                "weight",
                Positive(),
            ),
            nn.Tanh,
            lambda: MeanOver(1),
            linear(3, 3),
        ),
        (3,),
        vocabulary=4,
        shared=True,
        layouts=weight_of("0"),
    ),
    Case(
        "positive-layer-norm",
        sequential(
            linear(4, 4),
            parametrized(
                later(nn.LayerNorm, 4), parametrize.register_parametrization, "weight", Positive()
            ),
            nn.Tanh,
            linear(4, 3),
        ),
        (4,),
        layouts=weight_of("1"),
    ),
    Case(
        "positive-bias",
        sequential(
            parametrized(linear(4, 5), parametrize.register_parametrization, "bias", Positive()),
            nn.Tanh,
            linear(5, 3),
        ),
        (4,),
        layouts=derived("0.parametrizations.bias.original"),
    ),
    Case(
        "pruned",
        sequential(pruned(linear(4, 5)), nn.Tanh, linear(5, 3)),
        (4,),
        layouts=derived("0.weight_orig"),
    ),
    Case(
        "pruned-conv",
        sequential(pruned(later(nn.Conv2d, 2, 4, 2, groups=2)), nn.Tanh, nn.Flatten, linear(8, 3)),
        (2, 2, 3),
        shared=True,
        layouts=derived("0.weight_orig"),
    ),
    Case(
        "weight-norm-subset",
        sequential(parametrized(linear(4, 5), parametrizations.weight_norm), nn.Tanh, linear(5, 3)),
        (4,),
        frozen=("0.bias", "2.weight"),
        left_out=("0.parametrizations.weight.original0",),
        layouts=weight_of("0", "original1"),
    ),
)
