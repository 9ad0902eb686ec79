"""What was seen of a task: across handles, several optimizers, and steps that fail."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, Optimizer

from rotate_ewc import EKFACPenalty, SnapshotError
from rotate_ewc.penalty.attachment import Attachment
from rotate_ewc.penalty.strength import FoundStrength
from tests.helpers.penalties import CE

Batches = Sequence[tuple[torch.Tensor, torch.Tensor]]
KINDS = [("Adam", "rotated"), ("SGD", "rotated"), ("Adam", "tangent"), ("Adam", "gradient")]


def batches_of(seed: int) -> Batches:
    """A linear problem of four classes that has nothing to do with that of another seed."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(400, 20, generator=generator)
    targets = (inputs @ torch.randn(20, 4, generator=generator)).argmax(1)
    return list(zip(inputs.split(20), targets.split(20), strict=True))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 4))


def learned() -> tuple[nn.Sequential, EKFACPenalty]:
    """A network that has learned a task, and a penalty that has consolidated it."""
    model, penalty = network(), EKFACPenalty()
    optimizer = Adam(model.parameters(), lr=1e-3)
    for _ in range(4):
        epoch(model, [optimizer], 0)
    penalty.consolidate(model, CE, batches_of(0))
    return model, penalty


def epoch(
    model: nn.Sequential,
    optimizers: Sequence[Optimizer],
    seed: int = 1,
    forget: Callable[[int], nn.Module] | None = None,
) -> None:
    """Twenty steps; `forget` tells of which part there is no gradient in a step."""
    for number, (inputs, targets) in enumerate(batches_of(seed)):
        model.zero_grad()
        CE(model(inputs), targets).backward()
        for parameter in forget(number).parameters() if forget else ():
            parameter.grad = None
        for optimizer in optimizers:
            optimizer.step()


def numbers_of(handle: Attachment[EKFACPenalty]) -> dict[str, Any]:
    return {key: value for key, value in handle.state_dict().items() if key != "update"}


def limit_of(penalty: EKFACPenalty) -> float:
    return penalty.strength_search.found.limit


def in_one_go(epochs: int = 6) -> EKFACPenalty:
    model, penalty = learned()
    optimizer = Adam(model.parameters(), lr=1e-3)
    penalty.attach(optimizer, model)
    for _ in range(epochs):
        epoch(model, [optimizer])
    assert penalty.strength == limit_of(penalty) < 50
    return penalty


@pytest.mark.parametrize("update", ["rotated", "tangent", "gradient"])
def test_a_handle_goes_on_with_what_another_has_seen_of_the_task(update: str) -> None:
    model, penalty = learned()
    optimizer = Adam(model.parameters(), lr=1e-3)
    seen = None
    for _ in range(3):
        with penalty.attach(optimizer, model, update) as handle:
            if seen is not None:
                again = handle.state_dict()["plasticity"]
                assert torch.equal(seen.pop("progress"), again.pop("progress"))
                assert seen == again
            epoch(model, [optimizer])
            seen = handle.state_dict()["plasticity"]
    assert seen["steps"][1] == 60
    penalty.consolidate(model, CE, batches_of(1))
    handle = penalty.attach(optimizer, model, update)
    assert handle.state_dict()["plasticity"]["steps"] == (0, 0)


def test_attaching_in_every_epoch_finds_much_the_same_strength() -> None:
    model, penalty = learned()
    optimizer = Adam(model.parameters(), lr=1e-3)
    for _ in range(6):
        with penalty.attach(optimizer, model):
            epoch(model, [optimizer])
    # The averages of the optimizer begin again, so the steps are others.
    assert penalty.strength == pytest.approx(in_one_go().strength, rel=0.5)


def test_a_copy_of_a_penalty_keeps_what_was_seen() -> None:
    model, penalty = learned()
    optimizer = Adam(model.parameters(), lr=1e-3)
    with penalty.attach(optimizer, model):
        epoch(model, [optimizer])
    ends = []
    for each in (copy.deepcopy(penalty), penalty):
        same = copy.deepcopy(model)
        own = Adam(same.parameters(), lr=1e-3)
        each.attach(own, same)
        epoch(same, [own])
        ends.append((each.strength, limit_of(each)))
    assert ends[0] == ends[1]


def test_a_run_resumed_without_the_state_of_its_handle_keeps_the_limit() -> None:
    model, penalty = learned()
    optimizer = Adam(model.parameters(), lr=1e-3)
    penalty.attach(optimizer, model)
    for _ in range(5):
        epoch(model, [optimizer])
    before = limit_of(penalty)
    other, again = Adam(model.parameters(), lr=1e-3), EKFACPenalty()
    other.load_state_dict(optimizer.state_dict())
    again.load_state_dict(penalty.state_dict())
    again.attach(other, model)
    epoch(model, [other])
    assert again.strength <= limit_of(again) <= before < 50


@pytest.mark.parametrize("order", [(0, 2), (2, 0)])
def test_the_smallest_limit_of_several_optimizers_counts(order: tuple[int, int]) -> None:
    model, penalty = learned()
    optimizers = [Adam(model[layer].parameters(), lr=1e-3) for layer in order]
    handles = [penalty.attach(optimizer, model) for optimizer in optimizers]
    for _ in range(6):
        epoch(model, optimizers)
    found = [handle.state_dict()["plasticity"]["looks"][1] for handle in handles]
    assert found[0] != found[1]
    assert penalty.strength == limit_of(penalty) == pytest.approx(min(found), rel=0.1)


def test_limits_of_others_and_from_before_stay() -> None:
    found = FoundStrength(limit=7.0)
    found.limit_to(9.0, 1e20)  # one that does not know of the seven
    assert found.limit == 7.0
    found.limit_to(5.0, 9.0)
    assert found.limit == 5.0
    found.limit_to(8.0, 5.0)  # its own, which was smaller before
    assert found.limit == 8.0
    found.limit_to(1e20, 8.0)
    assert found.limit == 1e20


def test_an_optimizer_of_heads_that_no_gradient_reaches_says_nothing() -> None:
    """Old heads are protected and at rest; the new one is neither."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Linear(20, 40), nn.ReLU())
            self.heads = nn.ModuleList([nn.Linear(40, 4)])

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            answers: torch.Tensor = self.heads[-1](self.body(inputs))
            return answers

    limits = []
    for shared in (True, False):
        model: Any = Heads()
        penalty = EKFACPenalty()
        for seed in range(2):
            parts = [model.parameters()]
            if not shared:
                parts = [model.body.parameters(), model.heads.parameters()]
            optimizers = [Adam(part, lr=1e-3) for part in parts]
            handles = [penalty.attach(optimizer, model) for optimizer in optimizers]
            for _ in range(4):
                epoch(model, optimizers, seed)
            if not seed:
                penalty.consolidate(model, CE, batches_of(0))
                for handle in handles:
                    handle.detach()
                model.heads.append(nn.Linear(40, 4))
                torch.manual_seed(1)
                model.heads[-1].reset_parameters()
        limits.append(limit_of(penalty))
    assert limits[0] == limits[1] < 1e3


def test_a_look_waits_for_a_gradient_of_what_was_stepped() -> None:
    """Each layer is stepped in every other step, so the next gradient tells nothing of it."""
    model, penalty = learned()
    optimizer = Adam(model.parameters(), lr=1e-3)
    penalty.attach(optimizer, model)
    for _ in range(8):
        epoch(model, [optimizer], forget=lambda number: model[2 * (number % 2)])
    assert penalty.strength == limit_of(penalty)
    assert limit_of(penalty) == pytest.approx(limit_of(in_one_go()), rel=1.0)


@pytest.mark.parametrize(("name", "update"), KINDS)
def test_steps_that_fail_are_not_seen(name: str, update: str) -> None:
    """A hook of the user's raises in every step once, and the step is taken again."""

    def fail(*_: object) -> None:
        raise RuntimeError("not now")

    ends = []
    for fails in (False, True):
        model, penalty = learned()
        kind: Any = {"Adam": Adam, "SGD": SGD}[name]
        optimizer = kind(model.parameters(), lr=1e-2)
        handle = penalty.attach(optimizer, model, update)
        for inputs, targets in batches_of(1):
            model.zero_grad()
            CE(model(inputs), targets).backward()
            if fails:
                hook = optimizer.register_step_pre_hook(fail)
                with pytest.raises(RuntimeError, match="not now"):
                    optimizer.step()
                hook.remove()
            optimizer.step()
        ends.append((handle.strength, dict(model.state_dict()), numbers_of(handle)))
    assert ends[0][0] == ends[1][0] != 1.0
    torch.testing.assert_close(ends[0][1:], ends[1][1:], rtol=0, atol=0)


@pytest.mark.parametrize("line", ["_look", "_shrunk"])
def test_an_interrupted_step_is_not_seen(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is taken again, and judged by the gradient after it, not by its own."""
    ends = []
    for interrupts in (False, True):
        model, penalty = learned()
        optimizer = Adam(model.parameters(), lr=1e-3)
        handle = penalty.attach(optimizer, model)
        original = getattr(type(handle._update), line)

        def interrupted(self: Any, *args: Any, original: Any = original) -> Any:
            original(self, *args)
            raise KeyboardInterrupt

        for number, (inputs, targets) in enumerate(batches_of(1)):
            model.zero_grad()
            CE(model(inputs), targets).backward()
            if interrupts and number in (0, 10):
                averages = copy.deepcopy(optimizer.state_dict())
                with monkeypatch.context() as patch:
                    patch.setattr(type(handle._update), line, interrupted)
                    with pytest.raises(KeyboardInterrupt):
                        optimizer.step()
                # The optimizer's own averages are its own affair.
                optimizer.load_state_dict(averages)
            optimizer.step()
        ends.append((handle.strength, dict(model.state_dict()), numbers_of(handle)))
    assert ends[0][0] == ends[1][0] != 1.0
    torch.testing.assert_close(ends[0][1:], ends[1][1:], rtol=0, atol=0)


def damaged(state: dict[str, Any]) -> list[dict[str, Any]]:
    """States of a handle with something wrong in what its update has kept."""
    own = state["state"]
    wrong: list[Any] = [None, [1], "state"]
    if "steps" in own:
        wrong += [{**own, "steps": value} for value in (None, -3, math.nan, "x", 1.5, True)]
    if "sums" in own:
        key = next(iter(own["sums"]), "0.weight")
        values = ({key: "b"}, {key: -1.0}, {key: math.nan}, {"a": 1.0}, {3: 1.0})
        wrong += [{**own, "sums": value} for value in (None, 7, *values)]
    return [{**state, "state": value} for value in wrong]


@pytest.mark.parametrize(
    ("name", "update", "every"),
    [
        *(("Adam", "rotated", 1), ("Adam", "tangent", 4), ("Adam", "gradient", 1)),
        *(("SGD", "rotated", 1), ("SGD", "rotated", 3)),
    ],
)
def test_damaged_states_change_nothing(name: str, update: str, every: int) -> None:
    model, penalty = learned()
    kind: Any = {"Adam": Adam, "SGD": SGD}[name]
    optimizer = kind(model.parameters(), lr=1e-2)
    handle: Attachment[EKFACPenalty] = penalty.attach(optimizer, model, update, every)
    epoch(model, [optimizer])
    before = copy.deepcopy(numbers_of(handle))
    for state in damaged(handle.state_dict()):
        with pytest.raises(SnapshotError, match="state of the handle has"):
            handle.load_state_dict(state)
    torch.testing.assert_close(numbers_of(handle), before, rtol=0, atol=0)
