"""Parameters written into views, copies on axes of their own, and tensors made of plain numbers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rotate_ewc import EKFACLinearOperator, FisherType
from tests.helpers.cases.modules import Uses
from tests.helpers.exactness import assert_exact_diagonal, seeded
from tests.helpers.oracles import dense_ggn, parameter_shapes

Function = Callable[[Any, Tensor], Tensor]


def into_slice(write: Callable[[Tensor, Tensor], object]) -> Function:
    """Return what writes the parameter's first row into a slice of a copy of the data."""

    def function(m: Any, x: Tensor) -> Tensor:
        copy = x.clone()
        write(copy[:, 1:], m.p[0])
        return copy

    return function


def augmented(m: Any, x: Tensor) -> Tensor:
    """Add to a slice by an augmented assignment, which also assigns the slice to itself."""
    copy = x.clone()
    copy[:, :1] += m.p[0]
    return copy


# The parameter p is [3, 4], the data are [examples, 3, 4].
WRITTEN: dict[str, Function] = {
    "add_": into_slice(lambda view, p: view.add_(p, alpha=-2)),
    "sub_": into_slice(lambda view, p: view.sub_(p)),
    "mul_": into_slice(lambda view, p: view.mul_(p)),
    "augmented assignment": augmented,
    "masked_fill_": lambda m, x: x.clone().masked_fill_(x > 0, m.p[1, 2]),
    "addmm by keywords": lambda m, x: torch.addmm(
        input=m.p[0, :3], mat2=m.p.T, mat1=x[:, 0], alpha=-1
    ),
    "repeated, then computed": lambda m, x: torch.cat(
        [m.p[:1, None].repeat(len(x), 1, 1).tanh(), x], 1
    ),
    "expanded, then cloned": lambda m, x: torch.cat(
        [m.p[:1, None].expand(len(x), 1, 4).clone(), x], 1
    ),
    "added to zeros": lambda m, x: torch.cat([m.p[:1, None] + x.new_zeros(len(x), 1, 4), x], 1),
}


# Embeddings of ids that the model makes itself, of which some are the examples' own.
MADE: dict[str, Function] = {
    "ids": lambda m, x: x + F.embedding(torch.tensor([2, 0, 1]), m.p),
    "as many ids as examples": lambda m, x: x[:, :2] + F.embedding(torch.tensor([2, 0]), m.p),
    "one id": lambda m, x: x + F.embedding(torch.tensor(1), m.p),
    "one row of zeros": lambda m, x: x + F.embedding(torch.zeros(1, 3, dtype=torch.long), m.p),
    "ids of the examples": lambda m, x: (
        x + F.embedding(torch.tensor([int(row[0, 0] > 0) for row in x]), m.p)[:, None]
    ),
}


@pytest.mark.parametrize("sizes", [[2, 3, 1], [3, 3], [6]], ids=str)
@pytest.mark.parametrize("name", [*WRITTEN, *MADE])
def test_exact(name: str, sizes: list[int]) -> None:
    """Also in batches of one, and of as many examples as there are entries on other axes."""
    x, y = seeded(6, 3, 4, seed=1), seeded(6, 2, seed=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        inner = Uses({**WRITTEN, **MADE}[name], p=(3, 4))
        model = nn.Sequential(nn.Linear(4, 4), inner, nn.Tanh(), nn.Flatten()).double()
        model.append(nn.Linear(model(x).shape[1], 2).double())
    operator = EKFACLinearOperator(
        model,
        nn.MSELoss(),
        list(model.parameters()),
        list(zip(torch.split(x, sizes), torch.split(y, sizes), strict=True)),
        fisher_type=FisherType.TYPE2,
    )
    names = [name for name, _ in model.named_parameters()]
    dense = dense_ggn(model, nn.MSELoss(), names, x, y)
    assert_exact_diagonal(operator, dense, parameter_shapes(model, names))


def test_error_is_the_first_one_where_nothing_helps() -> None:
    """Where examples are mixed, taking what is made of numbers for shared does not help."""

    def mixed(m: Any, x: Tensor) -> Tensor:
        return (x - x.mean(0)) + F.embedding(torch.tensor([2, 0, 1]), m.p)

    model = nn.Sequential(nn.Linear(4, 4), Uses(mixed, p=(3, 4)), nn.Flatten()).double()
    data = [(seeded(6, 3, 4), seeded(6, 12))]
    with pytest.raises(ValueError, match=r"1\.p"):
        EKFACLinearOperator(model, nn.MSELoss(), list(model.parameters()), data)


def test_attributes_that_contain_themselves() -> None:
    """Tensors are looked for in attributes, but not without an end."""
    settings: dict[str, Any] = {"positions": torch.arange(3)}
    settings["of"] = settings
    model: Any = nn.Linear(3, 2).double()
    model.settings = settings
    operator = EKFACLinearOperator(
        model, nn.MSELoss(), list(model.parameters()), [(seeded(4, 3), seeded(4, 2))]
    )
    assert operator.trace > 0
