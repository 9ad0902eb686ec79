"""Matrix products with parameters that no module owns."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.helpers.cases.case import Case, derived, diagonal
from tests.helpers.cases.modules import (
    ChannelsFirst,
    MeanOver,
    SwapFirst,
    applied,
    linear,
    sequential,
    using,
)
from tests.helpers.oracles import BlockLayout


def as_linear(turn: Callable[[Tensor], Tensor]) -> Callable[[nn.Module], nn.Module]:
    """Return what replaces a Sequential's first module by a Linear with its parameters.

    Args:
        turn: From the parameter to a Linear's weight.
    """

    def replaced(model: nn.Module) -> nn.Module:
        own: Any
        own, *others = model.children()
        weight = nn.Parameter(turn(own.w).detach().clone())
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=hasattr(own, "b")).double()
        layer.weight = weight
        if hasattr(own, "b"):
            layer.bias = own.b
        return nn.Sequential(layer, *others)

    return replaced


class Pairs(nn.Module):
    """A bilinear form of two halves of the input."""

    def __init__(self) -> None:
        """Make the layer."""
        super().__init__()
        self.form = nn.Bilinear(2, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Apply it."""
        form: Tensor = self.form(x[:, :2], x[:, 2:])
        return form


NAMES = (("0.w", "0.weight"), ("0.b", "0.bias"))

PRODUCTS: tuple[Case, ...] = (
    Case(
        "functional-linear",
        sequential(
            using(lambda m, x: F.linear(x, m.w, m.b), w=(5, 4), b=(5,)), nn.Tanh, linear(5, 3)
        ),
        (4,),
        layouts=(BlockLayout(("0.w", "0.b")),),
        reference=as_linear(lambda w: w),
        renamed=NAMES,
    ),
    Case(
        "functional-linear-tokens",
        sequential(
            using(lambda m, x: F.linear(x, m.w), w=(5, 4)),
            nn.Tanh,
            lambda: MeanOver(1),
            linear(5, 3),
        ),
        (3, 4),
        shared=True,
        layouts=(BlockLayout(("0.w",)),),
        reference=as_linear(lambda w: w),
        renamed=NAMES,
    ),
    Case(
        "matmul-rows",
        sequential(using(lambda m, x: x @ m.w, w=(4, 5)), nn.Tanh, linear(5, 3)),
        (4,),
        layouts=(BlockLayout(("0.w",), transposed=True),),
        reference=as_linear(lambda w: w.T),
        renamed=NAMES,
    ),
    Case(
        "matmul-tokens",
        sequential(
            using(lambda m, x: torch.matmul(x, m.w), w=(4, 5)),
            nn.Tanh,
            linear(5, 3),
            ChannelsFirst,
        ),
        (2, 4),
        (3, 2),
        shared=True,
        layouts=(BlockLayout(("0.w",), transposed=True),),
        reference=as_linear(lambda w: w.T),
        renamed=NAMES,
    ),
    Case(
        "matmul-grid",
        sequential(
            using(lambda m, x: x.matmul(m.w), w=(3, 4)),
            nn.Tanh,
            lambda: MeanOver(1, 2),
            linear(4, 3),
        ),
        (2, 2, 3),
        shared=True,
        layouts=(BlockLayout(("0.w",), transposed=True),),
        reference=as_linear(lambda w: w.T),
        renamed=NAMES,
    ),
    Case(
        "matmul-time-first",
        sequential(
            SwapFirst,
            using(lambda m, x: x @ m.w, w=(4, 5)),
            nn.Tanh,
            lambda: MeanOver(0),
            linear(5, 3),
        ),
        (3, 4),
        shared=True,
        layouts=(BlockLayout(("1.w",), transposed=True),),
    ),
    Case(
        "mm-merged-rows",
        sequential(
            lambda: nn.Flatten(0, 1),
            using(lambda m, x: torch.mm(x, m.w), w=(4, 5)),
            nn.Tanh,
            lambda: nn.Unflatten(0, (-1, 3)),
            lambda: MeanOver(1),
            linear(5, 3),
        ),
        (3, 4),
        shared=True,
        layouts=(BlockLayout(("1.w",), transposed=True),),
    ),
    Case(
        "mm-rows-time-major",
        sequential(
            applied(lambda x: x.transpose(0, 1).flatten(0, 1)),
            using(lambda m, x: torch.mm(x, m.w), w=(4, 5)),
            nn.Tanh,
            linear(5, 4),
            applied(lambda x: x.unflatten(0, (3, -1)).mean(dim=0)),
            linear(4, 3),
        ),
        (3, 4),
        shared=True,
        layouts=(BlockLayout(("1.w",), transposed=True),),
    ),
    Case(
        "addmm",
        sequential(
            using(lambda m, x: torch.addmm(m.b, x, m.w), w=(4, 5), b=(5,)), nn.Tanh, linear(5, 3)
        ),
        (4,),
        layouts=(BlockLayout(("0.w", "0.b"), transposed=True),),
        reference=as_linear(lambda w: w.T),
        renamed=NAMES,
    ),
    Case(
        "addmm-linear",
        sequential(
            using(lambda m, x: torch.addmm(m.b, x, m.w), w=(4, 5), b=(5,)),
            using(lambda m, x: x @ m.w, w=(5, 3)),
        ),
        (4,),
        layouts=(
            BlockLayout(("0.w", "0.b"), transposed=True),
            BlockLayout(("1.w",), transposed=True),
        ),
        reference=as_linear(lambda w: w.T),
        renamed=NAMES,
    ),
    Case(
        "matmul-plus-bias",
        sequential(using(lambda m, x: x @ m.w + m.b, w=(4, 5), b=(5,)), nn.Tanh, linear(5, 3)),
        (4,),
        layouts=(BlockLayout(("0.w",), transposed=True), *diagonal("0.b")),
        reference=as_linear(lambda w: w.T),
        renamed=NAMES,
    ),
    Case(
        "matmul-twice",
        sequential(using(lambda m, x: torch.tanh(x @ m.w) @ m.w, w=(4, 4)), nn.Tanh, linear(4, 3)),
        (4,),
        shared=True,
        layouts=(BlockLayout(("0.w",), transposed=True),),
    ),
    Case(
        "low-rank",
        sequential(using(lambda m, x: x @ m.w @ m.b, w=(4, 2), b=(2, 5)), nn.Tanh, linear(5, 3)),
        (4,),
        layouts=(
            BlockLayout(("0.w",), transposed=True),
            BlockLayout(("0.b",), transposed=True),
        ),
    ),
    Case(
        "weight-first",
        sequential(
            using(lambda m, x: m.w @ x, w=(5, 4)), nn.Tanh, lambda: MeanOver(2), linear(5, 3)
        ),
        (4, 3),
        shared=True,
        layouts=(BlockLayout(("0.w",)),),
    ),
    Case(
        "weight-first-transposed-rows",
        sequential(using(lambda m, x: (m.w @ x.mT).mT, w=(5, 4)), nn.Tanh, linear(5, 3)),
        (4,),
        layouts=(BlockLayout(("0.w",)),),
        reference=as_linear(lambda w: w),
        renamed=NAMES,
    ),
    Case(
        "vector-last",
        sequential(using(lambda m, x: x @ m.w, w=(4,)), nn.Tanh, linear(3, 3)),
        (3, 4),
        shared=True,
        layouts=(BlockLayout(("0.w",), transposed=True),),
    ),
    Case(
        "vector-first",
        sequential(using(lambda m, x: m.w @ x, w=(4,)), nn.Tanh, linear(3, 3)),
        (4, 3),
        shared=True,
        layouts=(BlockLayout(("0.w",), transposed=True),),
    ),
    Case(
        "matrix-vector",
        sequential(using(lambda m, x: torch.mv(x, m.w)[:, None], w=(4,)), nn.Tanh, linear(1, 3)),
        (4,),
        layouts=(BlockLayout(("0.w",), transposed=True),),
    ),
    Case(
        "expanded-weight",
        sequential(
            using(lambda m, x: torch.bmm(x, m.w.expand(len(x), -1, -1)), w=(4, 5)),
            nn.Tanh,
            lambda: MeanOver(1),
            linear(5, 3),
        ),
        (3, 4),
        shared=True,
        layouts=(BlockLayout(("0.w",), transposed=True),),
        reference=as_linear(lambda w: w.T),
        renamed=NAMES,
    ),
    Case(
        "a-weight-for-each-head",
        sequential(using(lambda m, x: (x @ m.w).flatten(1), w=(2, 4, 3)), nn.Tanh, linear(12, 3)),
        (2, 2, 4),
        shared=True,
        layouts=derived("0.w"),
    ),
    Case(
        "experts-by-batched-product",
        sequential(
            using(
                lambda m, x: torch.baddbmm(m.b, x.transpose(0, 1), m.w).mean(0),
                w=(2, 4, 3),
                b=(2, 1, 3),
            ),
            nn.Tanh,
            linear(3, 3),
        ),
        (2, 4),
        layouts=(*derived("0.w"), *diagonal("0.b")),
    ),
    Case(
        "einsum-heads",
        sequential(
            using(lambda m, x: torch.einsum("ntd,hde->nhe", x, m.w).flatten(1), w=(2, 4, 3)),
            nn.Tanh,
            linear(6, 3),
        ),
        (3, 4),
        shared=True,
        layouts=derived("0.w"),
    ),
    Case(
        "einsum-projection-to-heads",
        sequential(
            using(lambda m, x: torch.einsum("...d,dhe->...he", x, m.w).flatten(2), w=(4, 2, 3)),
            nn.Tanh,
            lambda: MeanOver(1),
            linear(6, 3),
        ),
        (3, 4),
        shared=True,
        layouts=(BlockLayout(("0.w",), transposed=True),),
        reference=as_linear(lambda w: w.flatten(1).T),
        renamed=NAMES,
    ),
    Case(
        "einsum-linear",
        sequential(
            using(lambda m, x: torch.einsum("oi,nti->nto", m.w, x), w=(5, 4)),
            nn.Tanh,
            lambda: MeanOver(1),
            linear(5, 3),
        ),
        (3, 4),
        shared=True,
        layouts=(BlockLayout(("0.w",)),),
        reference=as_linear(lambda w: w),
        renamed=NAMES,
    ),
    Case(
        "bilinear",
        sequential(linear(4, 4), nn.Tanh, Pairs, nn.Tanh, linear(3, 3)),
        (4,),
        layouts=(*derived("2.form.weight"), BlockLayout(("2.form.bias",), kind="bias")),
    ),
)
