"""Every way of spelling an operation: exact blocks, whatever function of torch is called."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rotate_ewc import EKFACLinearOperator
from rotate_ewc.layers import RULES
from tests.helpers.exactness import assert_exact_diagonal, seeded
from tests.helpers.oracles import parameter_shapes, squared_error_ggn

MSE = nn.MSELoss()
Function = Callable[[Tensor, Tensor], Tensor]


class Using(nn.Module):
    """Uses a parameter as some function does, then a linear layer."""

    def __init__(self, function: Function, w: Tensor) -> None:
        """Keep both."""
        super().__init__()
        self.function, self.w = function, nn.Parameter(w)
        self.head = nn.Linear(3, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        """Flatten to as many features as the head takes."""
        used = self.function(self.w, x).flatten(1).tanh()
        return self.head(F.adaptive_avg_pool1d(used[:, None], 3)[:, 0])


def check(function: Function, w: Tensor, x: Tensor) -> EKFACLinearOperator:
    """Compare every eigenvalue with the exact matrix in the block's own basis."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Using(function, w)
    y = torch.zeros(len(x), 2, dtype=torch.float64)
    names = [name for name, _ in model.named_parameters()]
    data = [(x[:4], y[:4]), (x[4:], y[4:])]
    params = dict(model.named_parameters())
    operator = EKFACLinearOperator(model, MSE, params, data, fisher_type="type2")
    dense = squared_error_ggn(model, x)
    assert_exact_diagonal(operator, dense, parameter_shapes(model, names))
    return operator


def in_place(name: str, change: Callable[[Tensor], Any]) -> Function:
    """Return the use by a method that writes into a copy of the data."""

    def use(w: Tensor, x: Tensor) -> Tensor:
        h = x.clone()
        getattr(h, name)(change(w))
        return h

    return use


def changed(statement: str) -> Function:
    """Return the use by a statement that changes h, a copy of the data."""

    def use(w: Tensor, x: Tensor) -> Tensor:
        names = {"h": x.clone(), "w": w}
        exec(statement, names)  # of this file's own
        return names["h"]

    return use


# ------------------------------------------------------------------ data of [7, 4], w of [4]

ELEMENTWISE: dict[str, Function] = {
    "x * w": lambda w, x: x * w,
    "w * x": lambda w, x: w * x,
    "x + w": lambda w, x: x + w,
    "w + x": lambda w, x: w + x,
    "x - w": lambda w, x: x - w,
    "w - x": lambda w, x: w - x,
    "x / w": lambda w, x: x / w,
    "w / x": lambda w, x: w / (2 + x.abs()),
    "x ** w": lambda w, x: x.abs() ** w,
    "w ** x": lambda w, x: w**x,
    "x % w": lambda w, x: x % w,
    "h *= w": changed("h *= w"),
    "h += w": changed("h += w"),
    "h -= w": changed("h -= w"),
    "h /= w": changed("h /= w"),
    **{
        f"Tensor.{name}": lambda w, x, name=name: getattr(x, name)(w)
        for name in (
            *("mul", "multiply", "add", "sub", "subtract", "div", "divide", "true_divide"),
            *("maximum", "minimum", "fmax", "fmin", "max", "min", "atan2", "arctan2", "hypot"),
            *("__mul__", "__rmul__", "__add__", "__radd__", "__sub__", "__rsub__", "__truediv__"),
            *("__rdiv__", "__rtruediv__", "clamp_min", "clamp_max", "logaddexp"),
            *("remainder", "fmod", "__mod__"),
        )
    },
    **{
        f"Tensor.{name} of the parameter": lambda w, x, name=name: getattr(w, name)(x.abs() + 0.5)
        for name in (
            *("mul", "add", "sub", "div", "pow", "maximum", "__mul__", "__rmul__", "__add__"),
            *("__radd__", "__sub__", "__rsub__", "__truediv__", "__rtruediv__", "__pow__"),
        )
    },
    **{
        f"Tensor.{name}": in_place(name, lambda w: w)
        for name in (
            *("mul_", "multiply_", "add_", "sub_", "subtract_", "div_", "divide_", "true_divide_"),
            *("__imul__", "__iadd__", "__isub__", "__itruediv__", "fmod_", "remainder_", "atan2_"),
            *("hypot_", "copy_"),
        )
    },
    **{
        f"torch.{name}": lambda w, x, name=name: getattr(torch, name)(x, w)
        for name in (
            *("mul", "multiply", "add", "sub", "subtract", "rsub", "div", "divide", "true_divide"),
            *("maximum", "minimum", "fmax", "fmin", "max", "min", "atan2", "hypot", "logaddexp"),
            *("logaddexp2", "clamp_min", "clamp_max", "fmod", "remainder"),
        )
    },
    "torch.pow": lambda w, x: torch.pow(x.abs(), w),
    "torch.float_power": lambda w, x: torch.float_power(x.abs(), w),
    "torch.xlogy": lambda w, x: torch.xlogy(x, w.abs()),
    "torch.lerp": lambda w, x: torch.lerp(x, w, 0.3) + torch.lerp(x, x.tanh(), w),
    "torch.addcmul": lambda w, x: torch.addcmul(w, x, w, value=0.5),
    "torch.addcdiv": lambda w, x: torch.addcdiv(x, x, w, value=0.5),
    "torch.clamp": lambda w, x: torch.clamp(x, min=w - 2, max=w),
    "alpha": lambda w, x: torch.add(x, w, alpha=2) + x.sub(w, alpha=0.3) + torch.add(w, x, alpha=3),
    "by name": lambda w, x: torch.mul(input=x, other=w) + x.add(other=w),
    "masked_fill": lambda w, x: x.masked_fill(x > 0, w.sum()) + w,
    "masked_fill function": lambda w, x: torch.masked_fill(x, x > 0, w[0]) + w,
    "where": lambda w, x: torch.where(x > 0, w, x),
    "where otherwise": lambda w, x: torch.where(x > 0, x, w),
    "where twice": lambda w, x: torch.where(x > 0, w, w.exp()),
    "where and a number": lambda w, x: torch.where(x > 0, w, 0.0),
    "Tensor.where": lambda w, x: x.where(x > 0, w) + w.where(x > 1, x),
    "single number": lambda w, x: x / w[0] + w[1] ** x + torch.maximum(x, w[2]) + w,
    "prelu": lambda w, x: F.prelu(x, w) + torch.prelu(x, w) + x.prelu(w),
    "prelu of one slope": lambda w, x: F.prelu(x, w[:1]) + w,
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise(name: str) -> None:
    """Parameters of the shape of an example; batches of as many examples as there are features."""
    check(ELEMENTWISE[name], seeded(4, seed=1).abs() + 0.5, seeded(7, 4))


# ------------------------------------------------------------------ products

PRODUCTS: dict[str, tuple[Function, tuple[int, ...], tuple[int, ...]]] = {
    **{
        f"Tensor.{name}": (lambda w, x, name=name: getattr(x, name)(w), (4, 3), (4,))
        for name in ("matmul", "mm", "__matmul__")
    },
    **{
        f"{owner.__name__}.{name}": (
            lambda w, x, owner=owner, name=name: getattr(owner, name)(x, w),
            (4, 3),
            (4,),
        )
        for owner, name in ((torch, "matmul"), (torch, "mm"), (torch.linalg, "matmul"))
    },
    "x @ w": (lambda w, x: x @ w, (4, 3), (4,)),
    "h @= w": (changed("h @= w"), (4, 4), (4,)),
    "x @ w of tokens": (lambda w, x: x @ w, (4, 3), (2, 4)),
    "w @ x": (lambda w, x: w @ x, (3, 4), (4, 2)),
    "w @ x of a grid": (lambda w, x: w @ x, (3, 4), (2, 4, 2)),
    "w @ x of columns": (lambda w, x: (w @ x.T).T, (3, 4), (4,)),
    "w.matmul": (lambda w, x: w.matmul(x), (3, 4), (4, 2)),
    "w.__matmul__": (lambda w, x: w.__matmul__(x), (3, 4), (4, 2)),
    "x.__rmatmul__": (lambda w, x: x.__rmatmul__(w), (3, 4), (4, 2)),
    "w.mm": (lambda w, x: w.mm(x.T).T, (3, 4), (4,)),
    "x @ v": (lambda w, x: x @ w, (4,), (2, 4)),
    "v @ x": (lambda w, x: w @ x, (4,), (4, 2)),
    "x @ v of rows": (lambda w, x: (x @ w)[:, None], (4,), (4,)),
    "v @ x of columns": (lambda w, x: (w @ x.T)[:, None], (4,), (4,)),
    "torch.mv": (lambda w, x: torch.mv(x, w)[:, None], (4,), (4,)),
    "Tensor.mv": (lambda w, x: x.mv(w)[:, None], (4,), (4,)),
    "torch.inner": (lambda w, x: torch.inner(x, w), (3, 4), (2, 4)),
    "Tensor.inner of vectors": (lambda w, x: x.inner(w), (4,), (2, 4)),
    "inner of a stack": (lambda w, x: torch.inner(x, w), (3, 2, 4), (2, 4)),
    "inner, the parameter first": (lambda w, x: torch.inner(w, x).T, (3, 4), (4,)),
    "x @ stack": (lambda w, x: x @ w, (2, 4, 3), (2, 3, 4)),
    "x @ stack, broadcast": (lambda w, x: x[:, None] @ w, (2, 4, 3), (3, 4)),
    "stack of one": (lambda w, x: x @ w, (1, 4, 3), (3, 4)),
    "stack @ x": (lambda w, x: w @ x, (2, 3, 4), (2, 4, 2)),
    "bmm expanded": (lambda w, x: torch.bmm(x, w.expand(len(x), -1, -1)), (4, 3), (2, 4)),
    "bmm repeated": (lambda w, x: x.bmm(w.repeat(len(x), 1, 1)), (4, 3), (2, 4)),
    "bmm expanded, first": (lambda w, x: w.expand(len(x), -1, -1).bmm(x), (3, 4), (4, 2)),
    "bmm over experts": (
        lambda w, x: torch.bmm(x.transpose(0, 1), w).transpose(0, 1),
        (2, 4, 3),
        (2, 4),
    ),
    "baddbmm": (
        lambda w, x: torch.baddbmm(x, x, w.expand(len(x), -1, -1), alpha=2, beta=0.5),
        (4, 4),
        (4, 4),
    ),
    "addmm": (lambda w, x: torch.addmm(w[0], x, w), (4, 3), (4,)),
    "addmm of data": (lambda w, x: torch.addmm(x, x, w), (4, 4), (4,)),
    "addmm of a constant": (
        lambda w, x: torch.addmm(torch.ones(3, dtype=x.dtype), x, w),
        (4, 3),
        (4,),
    ),
    "Tensor.addmm with multiples": (lambda w, x: x.addmm(x, w, alpha=2, beta=3), (4, 4), (4,)),
    "addmm, the weight first": (lambda w, x: torch.addmm(x.T, w, x.T).T, (4, 4), (4,)),
    "addmv": (lambda w, x: torch.addmv(x[:, 0], x, w)[:, None], (4,), (4,)),
    "tensordot": (lambda w, x: torch.tensordot(x, w, dims=([2], [1])), (3, 4), (2, 4)),
    "tensordot over two": (lambda w, x: torch.tensordot(x, w, 2), (2, 4, 3), (2, 4)),
    "tensordot, the parameter first": (
        lambda w, x: torch.tensordot(w, x, dims=([1], [1])).movedim(1, 0),
        (3, 4),
        (4, 2),
    ),
    "F.linear": (lambda w, x: F.linear(x, w), (3, 4), (2, 4)),
    "F.bilinear": (lambda w, x: F.bilinear(x, x.tanh(), w), (3, 4, 4), (2, 4)),
    "einsum": (lambda w, x: torch.einsum("ni,oi->no", x, w), (3, 4), (4,)),
    "einsum, the parameter first": (lambda w, x: torch.einsum("oi,nti->nto", w, x), (3, 4), (2, 4)),
    "einsum with spaces": (lambda w, x: torch.einsum("n i, i o -> n o", x, w), (4, 3), (4,)),
    "einsum without an arrow": (lambda w, x: torch.einsum("ai,io", x, w), (4, 3), (4,)),
    "einsum with an ellipsis": (lambda w, x: torch.einsum("...i,oi->...o", x, w), (3, 4), (2, 4)),
    "einsum of a list": (lambda w, x: torch.einsum("ni,io->no", [x, w]), (4, 3), (4,)),
    "einsum, examples second": (
        lambda w, x: torch.einsum("nhd,hde->hne", x, w).transpose(0, 1),
        (2, 4, 3),
        (2, 4),
    ),
    "einsum, examples move": (
        lambda w, x: torch.einsum("ntd,de->tne", x, w).transpose(0, 1),
        (4, 3),
        (2, 4),
    ),
    "einsum that sums data": (lambda w, x: torch.einsum("ntd,de->ne", x, w), (4, 3), (2, 4)),
    "einsum elementwise": (lambda w, x: torch.einsum("ntd,td->ntd", x, w), (2, 4), (2, 4)),
    "einsum outer": (lambda w, x: torch.einsum("nd,e->nde", x, w), (3,), (4,)),
    "einsum attention-like": (
        lambda w, x: torch.einsum("nhqd,hkd->nhqk", x, w),
        (2, 3, 4),
        (2, 2, 4),
    ),
    "einsum of heads to features": (
        lambda w, x: torch.einsum("nhd,hdo->no", x, w),
        (2, 4, 3),
        (2, 4),
    ),
    "einsum with a constant axis of one": (
        lambda w, x: torch.einsum("nti,oi->nto", x, w),
        (3, 1),
        (2, 1),
    ),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name: str) -> None:
    """Of every form that a rule reads."""
    function, w, shape = PRODUCTS[name]
    check(function, 0.5 * seeded(*w, seed=1), seeded(7, *shape))


# ------------------------------------------------------------------ concatenation

CONCATENATIONS: dict[str, tuple[Function, tuple[int, ...]]] = {
    **{
        f"{name} of {kind}": (
            lambda w, x, name=name, copy=copy: getattr(torch, name)([copy(w, x), x], dim=1),
            (1, 2, 4),
        )
        for name in ("cat", "concat", "concatenate")
        for kind, copy in {
            "expand": lambda w, x: w.expand(len(x), -1, -1),
            "expand_as": lambda w, x: w.expand_as(x),
            "broadcast_to": lambda w, x: torch.broadcast_to(w, (len(x), 2, 4)),
            "repeat": lambda w, x: w.repeat(len(x), 1, 1),
            "tile": lambda w, x: w.tile((len(x), 1, 1)),
            "repeat_interleave": lambda w, x: w.repeat_interleave(len(x), dim=0),
            "stack": lambda w, x: torch.stack([w[0]] * len(x)),
            "cat": lambda w, x: torch.cat([w] * len(x)),
            "blank": lambda w, x: torch.zeros(len(x), 1, 1, dtype=w.dtype) + w,
            "views": lambda w, x: w.expand(len(x), -1, -1).flatten(1).unflatten(1, (2, 4)),
            "expanded and changed": lambda w, x: (w.expand(len(x), -1, -1) * 2).exp(),
            "changed and expanded": lambda w, x: w.exp().expand(len(x), -1, -1),
            "index": lambda w, x: w[torch.zeros(len(x), dtype=torch.long)],
            "broadcast_tensors": lambda w, x: torch.broadcast_tensors(w, x)[0],
            "type_as": lambda w, x: w.expand(len(x), -1, -1).type_as(x).to(x),
        }.items()
    },
    "hstack": (lambda w, x: torch.hstack([w.expand(len(x), -1, -1), x]), (2, 4)),
    "vstack, time first": (
        lambda w, x: torch.vstack(
            [w[:, None].expand(-1, len(x), -1), x.mT.mT.transpose(0, 1)]
        ).transpose(0, 1),
        (2, 4),
    ),
    "dstack": (lambda w, x: torch.dstack([w.expand(len(x), -1, -1), x]), (2, 4)),
    "stack": (lambda w, x: torch.stack([w.expand(len(x), -1, -1), x], dim=2), (2, 4)),
    "column_stack": (
        lambda w, x: torch.column_stack([w.expand(len(x), -1), x.flatten(1)]),
        (3,),
    ),
    "after the data, twice": (
        lambda w, x: torch.cat([x, w.expand(len(x), -1, -1), w.repeat(len(x), 1, 1) * 2], dim=1),
        (2, 4),
    ),
    "in a sum as well": (
        lambda w, x: (lambda e: torch.cat([x * e, e], dim=1) + e.repeat(1, 2, 1))(
            w.expand(len(x), -1, -1)
        ),
        (2, 4),
    ),
    "one item": (changed("h[:, 0] = w"), (4,)),
    "one item of many": (changed("h[:, :1] = w"), (1, 1, 4)),
    "copy_": (changed("h[:, 1].copy_(w)"), (4,)),
    "written into a blank": (
        lambda w, x: changed("h[:, 0] = w")(w, torch.zeros(len(x), 2, 4, dtype=x.dtype)) + x,
        (4,),
    ),
    "data written into copies": (
        lambda w, x: changed("w[:, 0] = h[:, 1]; h = w")(w.repeat(len(x), 1, 1).clone(), x),
        (2, 4),
    ),
    "mask of attention": (
        lambda w, x: F.scaled_dot_product_attention(x, x, x, attn_mask=w),
        (2, 2),
    ),
    "keys of attention": (
        lambda w, x: F.scaled_dot_product_attention(
            x, w.expand(len(x), -1, -1), w.expand(len(x), -1, -1)
        ),
        (3, 4),
    ),
}
REFUSED = {"data written into copies"}


@pytest.mark.parametrize("name", CONCATENATIONS)
def test_concatenations(name: str) -> None:
    """Tokens before, after and between the data; refused by name where copies are overwritten."""
    function, w = CONCATENATIONS[name]
    if name in REFUSED:
        with pytest.raises(ValueError, match="'w' is used by"):
            check(function, seeded(*w, seed=1), seeded(7, 2, 4))
    else:
        check(function, seeded(*w, seed=1), seeded(7, 2, 4))


# ------------------------------------------------------------------ looking up

LOOKUPS: dict[str, tuple[Function, tuple[int, ...]]] = {
    "w[i]": (lambda w, i: w[i], (5, 4)),
    "w[i] of vectors": (lambda w, i: w[i], (5,)),
    "w[i] of matrices": (lambda w, i: w[i], (5, 2, 3)),
    "w[-i]": (lambda w, i: w[-i], (5, 4)),
    "w[i.int()]": (lambda w, i: w[i.int()], (5, 4)),
    "w[:, i]": (lambda w, i: w[:, i].movedim(0, -1), (4, 5)),
    "w[0, i]": (lambda w, i: w[0, i], (4, 5)),
    "w[i, i]": (lambda w, i: w[i[:, 0], i[:, 1]][:, None], (5, 5)),
    "w[i, j, None]": (lambda w, i: w[i[:, 0], None, 1:], (5, 4)),
    "w[i][:, constant]": (lambda w, i: w[i][:, torch.tensor([0, 2])], (5, 4)),
    "w[constant][i]": (lambda w, i: w[torch.tensor([4, 3, 2, 1, 0])][i], (5, 4)),
    "w[condition]": (lambda w, i: w[(i > 2).long()], (5, 4)),
    "F.embedding": (lambda w, i: F.embedding(i, w), (5, 4)),
    "torch.index_select": (lambda w, i: torch.index_select(w, 0, i[:, 0]), (5, 4)),
    "Tensor.index_select": (lambda w, i: w.index_select(0, i[:, 0]), (5, 4)),
    "index_select of columns": (lambda w, i: w.index_select(1, i[:, 0]).T, (4, 5)),
    "torch.gather": (
        lambda w, i: torch.gather(w.expand(len(i), -1, -1), 1, i[..., None].expand(-1, -1, 4)),
        (5, 4),
    ),
    "Tensor.gather": (lambda w, i: w.expand(len(i), -1).gather(1, i), (5,)),
    "torch.take": (lambda w, i: torch.take(w, i), (5, 4)),
    "Tensor.take": (lambda w, i: w.take(i), (5, 4)),
    "torch.take_along_dim": (lambda w, i: torch.take_along_dim(w, i, dim=0), (5, 3)),
    "changed rows": (lambda w, i: w.exp()[i], (5, 4)),
    "rows of a bias": (lambda w, i: w[i] + w[2], (5, 4)),
}


@pytest.mark.parametrize("name", LOOKUPS)
def test_lookups(name: str) -> None:
    """By indices that are data, three for each example."""
    function, w = LOOKUPS[name]
    generator = torch.Generator().manual_seed(3)
    check(function, seeded(*w, seed=1), torch.randint(5, (7, 3), generator=generator))


def test_indices_that_are_constant() -> None:
    """Made from numbers in the forward pass, they are no data."""
    tables: dict[str, Function] = {
        "list": lambda w, x: x + w[[2, 0]],
        "tensor": lambda w, x: x + w[torch.tensor([2, 0])],
        "embedding": lambda w, x: x + F.embedding(torch.arange(2), w),
        "gather": lambda w, x: x + w.gather(0, torch.tensor([[0, 1, 2, 0]])),
        "linspace": lambda w, x: x + torch.linspace(0, 1, 3, dtype=w.dtype) @ w,
        "weights": lambda w, x: x + (w * torch.tensor([[0.5], [2.0], [1.0]])).sum(0),
    }
    for function in tables.values():
        check(function, seeded(3, 4, seed=1), seeded(7, 2, 4))


def test_normalisations() -> None:
    """By the functions under those of `torch.nn.functional`."""
    check(lambda w, x: torch.layer_norm(x, (4,), w, w), seeded(4, seed=1), seeded(7, 2, 4))
    check(lambda w, x: torch.rms_norm(x, (4,), w), seeded(4, seed=1), seeded(7, 2, 4))
    check(lambda w, x: torch.group_norm(x, 2, w, w), seeded(4, seed=1), seeded(7, 4, 3))


def test_rules_cover_functions_that_exist() -> None:
    """A name that torch does not know would be left out in silence."""
    names = {function.__name__ for function in RULES}
    wanted = {"matmul", "linalg_matmul", "mm", "bmm", "mv", "addmm", "inner", "tensordot", "einsum"}
    wanted |= {"mul", "multiply", "add", "add_", "sub", "subtract", "sub_", "gather", "take"}
    assert wanted <= names
