"""Steps of attached penalties that fail half-way: what is left is consistent, as documented."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, Optimizer, RMSprop

from rotate_ewc.penalty.displacement import Displacement
from tests.helpers.crossing import crossed
from tests.helpers.dense_steps import draw
from tests.helpers.oracles import assert_close
from tests.helpers.penalties import consolidated, flat, flat_gradient, quadratic

UPDATES = ["rotated", "tangent", "gradient"]


def failing(model: nn.Module, kind: type[Optimizer] = Adam) -> Optimizer:
    """An optimizer that steps the first layer, and fails at the second."""
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
    optimizer = kind(groups, lr=0.1)
    optimizer.param_groups[1]["weight_decay"] = "large"
    return optimizer


def step_and_fail(optimizer: Optimizer) -> None:
    with pytest.raises((TypeError, RuntimeError)):
        optimizer.step()


def states(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Copies of what an optimizer knows of each of its parameters."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return [copy.deepcopy(optimizer.state.get(p, {})) for p in parameters]


def assert_steps_as_new(model: nn.Module, optimizer: Optimizer) -> None:
    """Compare an optimizer that has no penalty any more with one that is new."""
    twin = copy.deepcopy(model)
    reference = type(optimizer)(twin.parameters(), lr=0.1)
    for step in range(2):
        for net, stepped in ((model, optimizer), (twin, reference)):
            draw(net, step)
            stepped.step()
    assert torch.equal(flat(model), flat(twin))


@pytest.mark.parametrize("kind", [Adam, Adagrad, RMSprop])
def test_averages_that_a_failed_step_began_in_an_eigenbasis_are_dropped(
    kind: type[Optimizer],
) -> None:
    """A detached optimizer would take them for averages in the standard basis."""
    model, penalty = consolidated("plain", 1)
    optimizer = failing(model, kind)
    handle = penalty.attach(optimizer, model)
    draw(model, 0)
    start, gradient, before = flat(model), flat_gradient(model), states(optimizer)
    step_and_fail(optimizer)
    assert torch.equal(flat(model), start)
    assert torch.equal(flat_gradient(model), gradient)
    assert repr(states(optimizer)) == repr(before)
    handle.detach()
    optimizer.param_groups[1]["weight_decay"] = 0.0
    assert_steps_as_new(model, optimizer)


def test_averages_of_an_interrupted_step_are_known_to_be_in_an_eigenbasis(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While the parameters come back from there, one block after another."""
    model, penalty = consolidated("plain", 1)
    optimizer = Adam(model.parameters(), lr=0.1)
    handle = penalty.attach(optimizer, model)
    draw(model, 0)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Displacement, "lead", interrupt)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
    handle.detach()
    assert_steps_as_new(model, optimizer)


def test_averages_of_earlier_steps_go_on_in_their_eigenbasis() -> None:
    """The optimizer's own, of what it had stepped, are not put back, as in plain PyTorch."""
    model, penalty = consolidated("plain", 1)
    optimizer = failing(model)
    penalty.attach(optimizer, model)
    optimizer.param_groups[1]["weight_decay"] = 0.0
    draw(model, 0)
    optimizer.step()
    optimizer.param_groups[1]["weight_decay"] = "large"
    draw(model, 1)
    start, gradient = flat(model), flat_gradient(model)
    step_and_fail(optimizer)
    assert torch.equal(flat(model), start)
    assert torch.equal(flat_gradient(model), gradient)
    assert [int(state["step"]) for state in states(optimizer)[:2]] == [2, 2]
    assert [state["eigenbasis_of_tasks"] for state in states(optimizer)] == [1, 1, 1, 1]
    optimizer.param_groups[1]["weight_decay"] = 0.0
    optimizer.step()
    assert [int(state["step"]) for state in states(optimizer)[:2]] == [3, 3]


@pytest.mark.parametrize(
    ("kind", "update"), [(Adam, "tangent"), (Adam, "gradient"), (SGD, "rotated")]
)
def test_other_updates_leave_what_the_optimizer_leaves(kind: type[Optimizer], update: str) -> None:
    """A step of what comes before the failure, with gradients that are the user's again."""
    model, penalty = consolidated("plain", 1)
    optimizer = failing(model, kind)
    penalty.attach(optimizer, model, update)
    draw(model, 0)
    twin = copy.deepcopy(model)
    reference = failing(twin, kind)
    gradient, tensors = flat_gradient(model), [p.grad for p in model.parameters()]
    draw(twin, 0)
    if kind is Adam:
        added = quadratic(penalty, model, 2.5 / 9).gradient(flat(model))
        whole = gradient + added
        for p, own in zip(twin.parameters(), split(whole, twin), strict=True):
            p.grad = own.view_as(p)
    start = flat(model)
    for stepped in (optimizer, reference):
        step_and_fail(stepped)
    assert not torch.equal(flat(model), start)
    assert_close(flat(model), flat(twin), 1e-9)
    assert torch.equal(flat_gradient(model), gradient)
    assert all(p.grad is g for p, g in zip(model.parameters(), tensors, strict=True))
    assert [len(state) for state in states(optimizer)] == [len(s) for s in states(reference)]


def split(vector: Tensor, model: nn.Module) -> tuple[Tensor, ...]:
    return vector.split([p.numel() for p in model.parameters()])


@crossed(update=UPDATES, kind=[SGD, Adam], first=[False, True])
def test_hooks_of_the_user_see_and_leave_a_whole_step(
    update: str, kind: type[Optimizer], first: bool
) -> None:
    """Whether they were registered before `attach` or after it, and also if they raise."""
    model, penalty = consolidated("plain", 1)
    twin = copy.deepcopy(model)
    optimizer, reference = (kind(net.parameters(), lr=0.1) for net in (model, twin))
    seen: list[Tensor] = []

    def hook(*_: Any) -> None:
        seen.append(flat(model))
        if len(seen) == 2:
            raise KeyboardInterrupt

    if first:
        optimizer.register_step_post_hook(hook)
    penalty.attach(optimizer, model, update)
    if not first:
        optimizer.register_step_post_hook(hook)
    penalty.attach(reference, twin, update)
    for step in range(3):
        for net in (model, twin):
            draw(net, step)
        if step == 1:
            with pytest.raises(KeyboardInterrupt):
                optimizer.step()
        else:
            optimizer.step()
        reference.step()
        assert torch.equal(seen[-1], flat(twin))
        assert torch.equal(flat(model), flat(twin))
        assert torch.equal(flat_gradient(model), flat_gradient(twin))
