"""A penalty that was cast, or the model without it: refused by name, or consolidated exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rotate_ewc import EKFACPenalty
from tests.helpers.exact import exact_penalty

CE = nn.CrossEntropyLoss()
LABELS = torch.arange(6) % 3


def inputs() -> Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(2))


class Learner(nn.Module):
    """A model with its penalty inside, which is cast with it."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 3)
        self.penalty = exact_penalty(fisher_type="type2", **options)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x)
        return found

    def learn(self) -> None:
        self.penalty.consolidate(self, CE, [(inputs().to(self.layer.weight.dtype), LABELS)])


def trace(model: Learner) -> float:
    """`Σ_n (1 - Σ_c p_nc²) (|x_n|² + 1)`: over weights and biases, of the sum of all losses."""
    dtype = model.layer.weight.dtype
    p = model.layer(inputs().to(dtype)).double().softmax(1).detach()
    x = inputs().to(dtype).double()
    return float(((1 - p.square().sum(1)) * (x.square().sum(1) + 1)).sum())


def cast_model(model: Learner, dtype: torch.dtype) -> None:
    model.layer.to(dtype)


def cast_penalty(model: Learner, dtype: torch.dtype) -> None:
    model.penalty.to(dtype)


def cast_both(model: Learner, dtype: torch.dtype) -> None:
    model.to(dtype)


@pytest.mark.parametrize(
    ("cast", "dtype", "of_penalty", "of_parameter", "wanted", "tolerance"),
    [
        (cast_both, torch.bfloat16, "bfloat16", "bfloat16", "float32", 2e-2),
        (cast_both, torch.float16, "float16", "float16", "float32", 2e-3),
        (cast_penalty, torch.float16, "float16", "float32", "float32", 2e-3),
        (cast_penalty, torch.float64, "float64", "float32", "float32", 1e-5),
        (cast_model, torch.float64, "float32", "float64", "float64", 1e-5),
    ],
)
def test_what_does_not_fit_together_is_refused(
    cast: Any, dtype: torch.dtype, of_penalty: str, of_parameter: str, wanted: str, tolerance: float
) -> None:
    """And the remedy is run as it is written."""
    model = Learner()
    model.learn()
    expected = trace(model)
    cast(model, dtype)
    before, terms = model.state_dict(), model.penalty.terms
    message = (
        rf"^the penalty's matrix of 'layer\.\w+' is in torch\.{of_penalty}, but .* of a parameter "
        rf"in torch\.{of_parameter}, is in torch\.{wanted}; .*call (penalty\.to\(torch\.{wanted}\))"
    )
    with pytest.raises(ValueError, match=message) as caught:
        model.learn()
    assert model.penalty.num_tasks == 1
    assert all(map(lambda one, other: one is other, model.penalty.terms, terms))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    penalty = model.penalty
    eval(str(caught.value).partition("call ")[2].partition(" before")[0])
    model.learn()
    assert penalty.num_tasks == 2
    expected += trace(model)
    found = penalty.terms[0].operator
    assert str(found.dtype) == f"torch.{wanted}"
    assert float(found.trace) == pytest.approx(expected, rel=tolerance)


def test_nothing_is_estimated_before() -> None:
    model = Learner()
    model.learn()
    model.double()
    model.penalty.float()
    runs: list[int] = []
    model.register_forward_pre_hook(lambda *_: runs.append(1))
    with pytest.raises(ValueError, match="dtype, to merge them"):
        model.learn()
    assert not runs


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_fits_is_consolidated(dtype: torch.dtype) -> None:
    """Both in float64; or apart, where nothing is merged."""
    model = Learner(mode="merged" if dtype is torch.float64 else "separate")
    for _ in range(2):
        model.learn()
        model.to(dtype)
    assert model.penalty.num_tasks == 2


def test_a_model_in_half_precision_has_a_matrix_in_float32() -> None:
    model, penalty = Learner().bfloat16(), EKFACPenalty(1.0)
    for _ in range(2):
        penalty.consolidate(model, CE, [(inputs().bfloat16(), LABELS)])
    assert penalty.terms[0].operator.dtype is torch.float32
