"""How far an optimizer goes for a gradient of one, against what it does."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from rotate_ewc import step_sizes_of

RATE = 0.01


def distance_for_one_gradient(optimizer: Optimizer, parameter: Tensor) -> Tensor:
    """Give a gradient of one once and then none, for as long as it goes on."""
    start = parameter.detach().clone()
    for step in range(400):
        parameter.grad = torch.full_like(parameter, float(step == 1))
        optimizer.step()
    return start - parameter.detach()


@pytest.mark.parametrize(("momentum", "dampening"), [(0.0, 0.0), (0.9, 0.0), (0.5, 0.3)])
def test_sgd_goes_that_far(momentum: float, dampening: float) -> None:
    model = nn.Linear(2, 1, bias=False).double()
    sgd = SGD(model.parameters(), lr=RATE, momentum=momentum, dampening=dampening)
    size = step_sizes_of(sgd, model, RATE)
    moved = distance_for_one_gradient(sgd, model.weight)
    torch.testing.assert_close(moved, torch.full_like(moved, float(size)))


@pytest.mark.parametrize("kind", [Adam, AdamW])
def test_adam_divides_by_its_typical_root_mean_square(kind: type[Optimizer]) -> None:
    model = nn.Linear(2, 1).double()
    optimizer = kind(model.parameters(), lr=RATE, eps=1e-12)  # type: ignore[call-arg]
    assert step_sizes_of(optimizer, model, RATE) == {"weight": 0.0, "bias": 0.0}
    model.weight.grad = torch.tensor([[2.0, 8.0]]).double()
    model.bias.grad = torch.zeros(1).double()
    optimizer.step()
    sizes = step_sizes_of(optimizer, model, RATE)
    assert isinstance(sizes, dict)
    assert sizes["weight"] == pytest.approx(RATE / 4)  # 4 is the geometric mean of 2 and 8
    assert sizes["bias"] == 0.0
    assert step_sizes_of(optimizer, dict(model.named_parameters()), RATE) == sizes


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"optimizer": RMSprop}, ValueError, "optimizer is RMSprop, whose step size is not known"),
        ({"model": 3}, TypeError, "model is int; expected a torch.nn.Module or a mapping"),
        ({"learning_rate": -1.0}, ValueError, "learning_rate is -1.0; expected a finite number"),
        ({"learning_rate": "1"}, TypeError, "learning_rate is '1'; expected a number"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    model = nn.Linear(2, 2)
    kind = change.pop("optimizer", SGD)
    arguments = {"model": model, "learning_rate": RATE, **change}
    with pytest.raises(error, match=message):
        step_sizes_of(kind(model.parameters(), lr=RATE), **arguments)
