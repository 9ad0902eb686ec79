"""The largest curvature of the penalty, and the warning before gradient descent diverges."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from rotate_ewc import EKFACPenalty
from tests.helpers.crossing import crossed
from tests.helpers.exact import exact_penalty
from tests.helpers.penalties import CE, MODELS, SUMMED, hessian, make, move, task


def learned(
    name: str, tasks: int, strength: float = 2.5, loss: nn.Module = CE, **options: Any
) -> tuple[nn.Module, EKFACPenalty]:
    model, penalty = make(name), exact_penalty(strength, seed=3, **options)
    for t in range(tasks):
        penalty.consolidate(model, loss, task(name, t, 9 + t), weight=1.0 + t)
        move(model, t)
    penalty.current_num_data = 20
    return model, penalty


def largest_eigenvalue(penalty: EKFACPenalty, model: nn.Module) -> float:
    return float(torch.linalg.eigvalsh(hessian(penalty, model)).max())


@crossed(name=MODELS, tasks=[1, 3], weighting=["examples", "uniform"], loss=[CE, SUMMED])
def test_is_exact_where_tasks_are_merged(
    name: str, tasks: int, weighting: str, loss: nn.Module
) -> None:
    model, penalty = learned(name, tasks, loss=loss, weighting=weighting, decay=0.7)
    exact = largest_eigenvalue(penalty, model)
    assert penalty.max_curvature == pytest.approx(exact, rel=1e-10)
    assert exact > 0


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*is deprecated:FutureWarning")
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_is_a_bound_where_tasks_are_separate(name: str, joint: bool) -> None:
    model, penalty = learned(name, 3, mode="separate", separate_weight_and_bias=not joint)
    exact = largest_eigenvalue(penalty, model)
    assert exact <= penalty.max_curvature * (1 + 1e-10)
    assert penalty.max_curvature <= 3 * exact
    model, penalty = learned(name, 1, mode="separate", separate_weight_and_bias=not joint)
    assert penalty.max_curvature == pytest.approx(largest_eigenvalue(penalty, model), rel=1e-10)


@pytest.mark.parametrize("mode", ["merged", "separate"])
@pytest.mark.filterwarnings("ignore:.*have grown, but not from the values:UserWarning")
def test_is_a_bound_where_parameters_have_grown(mode: str) -> None:
    """Terms of different sizes pull at the same entries."""
    torch.manual_seed(0)
    penalty = exact_penalty(2.5, mode, fisher_type="type2")
    penalty.consolidate(nn.Linear(4, 3).double(), CE, task("plain", 0))
    grown = nn.Linear(4, 5).double()
    penalty.consolidate(grown, CE, task("plain", 0, classes=5))
    exact = largest_eigenvalue(penalty, grown)
    assert exact <= penalty.max_curvature * (1 + 1e-10)


@pytest.mark.parametrize("mode", ["merged", "separate"])
def test_is_zero_where_there_is_nothing(mode: str) -> None:
    penalty = exact_penalty(2.5, mode)
    assert penalty.max_curvature == 0.0
    assert penalty.check_learning_rate(1e9) is True
    _, penalty = learned("plain", 1, strength=0.0, mode=mode)
    assert penalty.max_curvature == 0.0
    assert penalty.check_learning_rate(1e9) is True


def descend(penalty: EKFACPenalty, model: nn.Module, learning_rate: float, steps: int) -> float:
    """How many times larger the penalty is after so many steps down its gradient."""
    first = penalty(model).item()
    for _ in range(steps):
        model.zero_grad()
        penalty(model).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= learning_rate * p.grad
    return penalty(model).item() / first


@pytest.mark.parametrize(
    ("name", "strength"), list(zip(MODELS, [0.3, 2.5, 40.0, 1.0], strict=True))
)
def test_warns_exactly_where_gradient_descent_diverges(name: str, strength: float) -> None:
    model, penalty = learned(name, 2, strength)
    limit = 2 / largest_eigenvalue(penalty, model)
    assert penalty.check_learning_rate(0.98 * limit) is True  # any warning would be an error
    assert penalty.check_learning_rate(0.0) is True
    with pytest.warns(UserWarning, match="the penalty will diverge under gradient descent"):
        assert penalty.check_learning_rate(1.02 * limit) is False
    assert descend(penalty, model, 0.98 * limit, 100) < 1
    assert descend(penalty, model, 1.02 * limit, 600) > 1e6


def test_convergence_below_the_bound_of_separate_tasks() -> None:
    model, penalty = learned("plain", 3, mode="separate")
    limit = 2 / penalty.max_curvature
    assert penalty.check_learning_rate(0.98 * limit) is True
    assert descend(penalty, model, 0.98 * limit, 100) < 1


def test_warning_tells_the_numbers() -> None:
    _, penalty = learned("plain", 2)
    rate = 6 / penalty.max_curvature
    with pytest.warns(UserWarning, match="will diverge") as caught:
        penalty.check_learning_rate(rate)
    text = str(caught[0].message)
    assert f"learning rate {rate:g}" in text
    assert f"curvature {penalty.max_curvature:.4g}" in text
    assert "strength 2.5" in text
    assert "is 6, more than 2" in text
    assert "update='rotated'" in text
    assert caught[0].filename == __file__


@pytest.mark.parametrize("strength", [0.3, 1.0, 2.5, 7.7, 40.0])
def test_advice_of_the_warning_can_be_followed(strength: float) -> None:
    model, penalty = learned("plain", 2, strength)
    rate = 7 / penalty.max_curvature
    with pytest.warns(UserWarning, match="will diverge") as caught:
        penalty.check_learning_rate(rate)
    advised = re.search(r"rate to (\S+) or the strength to (\S+),", str(caught[0].message))
    assert advised is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert penalty.check_learning_rate(float(advised[1]))
        penalty.strength = float(advised[2])
        assert penalty.check_learning_rate(rate)
    penalty.strength = strength
    call = re.search(r"call (penalty\.attach\(.*?\))", str(caught[0].message))
    assert call is not None
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    eval(call[1], {"penalty": penalty, "optimizer": optimizer, "model": model})
    first = penalty(model).item()
    for _ in range(100):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert penalty(model).item() < 0.1 * first


@pytest.mark.parametrize("rate", [-0.1, float("nan"), True, "0.1", None])
def test_bad_learning_rates(rate: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=f"learning_rate is {rate!r}"):
        exact_penalty().check_learning_rate(rate)
