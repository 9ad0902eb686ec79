"""What is timed does what it is said to do."""

from collections.abc import Callable
from itertools import groupby

import pytest
import torch
from torch import nn

from benchmarks.contenders import (
    MODES,
    PENALTY,
    ROTATED_STEP,
    TRAINING_STEP,
    Contender,
    contenders,
    network,
    penalties,
)
from rotate_ewc import EKFACPenalty

TASKS = (1, 2, 5)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few inputs instead of 784."""
    monkeypatch.setattr("benchmarks.contenders.FEATURES", 6)
    torch.manual_seed(0)


def values(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def test_the_network_is_that_of_the_benchmarks() -> None:
    shapes = [tuple(parameter.shape) for parameter in network((5, 4)).parameters()]
    assert shapes == [(5, 6), (5,), (4, 5), (4,), (10, 4), (10,)]


@pytest.mark.parametrize("mode", MODES)
def test_there_is_a_penalty_for_every_number_of_tasks(mode: str) -> None:
    found = penalties(network((5,)), mode, TASKS)
    assert list(found) == list(TASKS)
    for tasks, penalty in found.items():
        assert (penalty.mode, penalty.num_tasks) == (mode, tasks)
        assert len(penalty.terms) == (tasks if mode == "separate" else 1)


@pytest.mark.parametrize("mode", MODES)
def test_copies_are_what_was_there_after_so_many_tasks(mode: str) -> None:
    """Later tasks do not change them."""
    found = []
    for tasks in ((2, 5), (2,)):
        torch.manual_seed(0)
        found.append(penalties(network((5,)), mode, tasks)[2])
    model = network((5,))
    assert found[0](model).item() == found[1](model).item() > 0


def test_only_separate_tasks_need_more_memory() -> None:
    sizes = {
        mode: [penalty.nbytes for penalty in penalties(network((5,)), mode, TASKS).values()]
        for mode in MODES
    }
    # Per layer: two bases for the weight, one for the bias, eigenvalues and anchors of both.
    entries = sum(d * d + e * e + d * d + 2 * (d * e + d) for d, e in ((5, 6), (10, 5)))
    assert sizes["merged"] == [4 * entries] * 3
    assert sizes["separate"] == [4 * entries * tasks for tasks in TASKS]


@pytest.fixture
def found() -> tuple[nn.Module, dict[str, EKFACPenalty]]:
    """A model and a penalty of each mode."""
    model = network((5,))
    return model, {mode: penalties(model, mode, (2,))[2] for mode in MODES}


def test_every_cost_has_its_contender(found) -> None:
    model, by_mode = found
    works = contenders(model, by_mode.values())
    assert set(works) == {
        Contender(TRAINING_STEP, None, 0),
        *(Contender(PENALTY, mode, 2) for mode in MODES),
        *(Contender(TRAINING_STEP, mode, 2) for mode in MODES),
        Contender(ROTATED_STEP, "merged", 2),
    }


def test_what_is_compared_is_timed_side_by_side() -> None:
    model = network((5,))
    both = [p for mode in MODES for p in penalties(model, mode, TASKS).values()]
    order = [(name.quantity, name.mode) for name in contenders(model, both)]
    assert len(order) == 1 + 6 + 6 + 3
    groups = [pair for pair, _ in groupby(order)]
    assert len(groups) == len(set(order)) == 6


@pytest.mark.parametrize("mode", MODES)
def test_work_with_the_penalty(found, mode: str) -> None:
    model, by_mode = found
    penalty, before = by_mode[mode], values(model)
    calls: list[float] = []
    penalty.register_forward_hook(lambda *arguments: calls.append(arguments[2].item()))
    works = contenders(model, [penalty])
    gradients = works[Contender(PENALTY, mode, 2)]()
    expected = torch.autograd.grad(penalty(model), list(model.parameters()))
    assert calls[0] == calls[1] > 0
    for gradient, exact in zip(gradients, expected, strict=True):
        assert torch.equal(gradient, exact)
    step = works[Contender(TRAINING_STEP, mode, 2)]
    for _ in range(2):
        step()
    assert calls[2] == calls[0]
    assert calls[3] != calls[0], "the step has moved its own copy of the model"
    assert len(calls) == 4
    assert all(map(torch.equal, values(model), before))


def test_the_plain_step_goes_without(found, monkeypatch: pytest.MonkeyPatch) -> None:
    model, by_mode = found
    works = contenders(model, by_mode.values())
    monkeypatch.setattr(EKFACPenalty, "forward", fail)
    works[Contender(TRAINING_STEP, None, 0)]()
    with pytest.raises(AssertionError, match="not to be called"):
        works[Contender(TRAINING_STEP, "merged", 2)]()


def test_the_rotated_step_obeys_the_penalty_and_evaluates_nothing(
    found, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, by_mode = found
    penalty, asked = by_mode["merged"], []
    deltas: Callable[..., dict[str, torch.Tensor]] = penalty.deltas

    def spy(parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        asked.append([p.detach().clone() for p in parameters.values()])
        return deltas(parameters)

    monkeypatch.setattr(penalty, "deltas", spy)
    work = contenders(model, [penalty])[Contender(ROTATED_STEP, "merged", 2)]
    monkeypatch.setattr(nn.Linear, "forward", fail)
    for _ in range(2):
        work()
    first, second = asked
    assert all(map(torch.equal, first, values(model)))
    assert not any(map(torch.equal, first, second)), "the first step has moved every parameter"


def fail(*arguments: object) -> None:
    raise AssertionError("not to be called")
