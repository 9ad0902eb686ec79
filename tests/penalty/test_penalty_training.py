"""The penalty in other loops: compiled, with accumulation, mixed precision, functional."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from rotate_ewc import EKFACPenalty
from tests.helpers.oracles import assert_close
from tests.helpers.penalties import (
    CE,
    Quadratic,
    dense_quadratic,
    flat,
    flat_gradient,
    make,
    move,
    shapes_of,
    task,
    unflat,
)


def learned(mode: str = "merged") -> tuple[nn.Module, EKFACPenalty, Quadratic]:
    """A model after one task, the penalty, and what it must be."""
    model, penalty = make("grouped"), EKFACPenalty(2.5, mode)
    penalty.consolidate(model, CE, task("grouped", 0))
    move(model, 0)
    (term,) = penalty.terms
    return (
        model,
        penalty,
        dense_quadratic(term.operator, term.anchor, shapes_of(model), weight(mode)),
    )


def weight(mode: str) -> float:
    return 2.5 / 9 if mode == "merged" else 2.5


def loss_gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    gradients = torch.autograd.grad(CE(model(x), y), list(model.parameters()))
    return torch.cat([gradient.flatten() for gradient in gradients])


@pytest.mark.parametrize("mode", ["merged", "separate"])
def test_step_compiled_as_a_whole(mode: str) -> None:
    model, penalty, form = learned(mode)
    x, y = task("grouped", 1)[0]
    compiled = torch.compile(model, backend="eager")

    @torch.compile(backend="eager")
    def objective(x: Tensor, y: Tensor) -> Tensor:
        return CE(compiled(x), y) + penalty(compiled)

    expected = loss_gradient(model, x, y) + form.gradient(flat(model))
    for _ in range(2):
        model.zero_grad()
        loss = objective(x, y)
        loss.backward()
        assert_close(loss.detach(), CE(model(x), y).detach() + form.value(flat(model)))
        assert_close(flat_gradient(model), expected)
    # Strength and terms are not frozen into the compiled code.
    penalty.strength = 5.0
    value = (objective(x, y) - CE(model(x), y)).detach()
    assert_close(value, 2 * form.value(flat(model)))


def test_penalty_attached_to_a_compiled_model() -> None:
    model, penalty, form = learned()
    compiled, before = torch.compile(model, backend="eager"), flat(model)
    x, y = task("grouped", 1)[0]
    optimizer = torch.optim.SGD(compiled.parameters(), lr=0.5)
    penalty.attach(optimizer, compiled)
    CE(compiled(x), y).backward()
    expected = form.proximal(before - 0.5 * flat_gradient(model), 0.5)
    optimizer.step()
    assert_close(flat(model) - before, expected - before)


@pytest.mark.parametrize("mode", ["merged", "separate"])
def test_gradient_accumulation(mode: str) -> None:
    """Gradients add up, whether the penalty is in every part or in one of its own."""
    model, penalty, form = learned(mode)
    batches = task("grouped", 1)
    expected = form.gradient(flat(model))
    for x, y in batches:
        expected = expected + loss_gradient(model, x, y) / 2
    for x, y in batches:
        ((CE(model(x), y) + penalty(model)) / 2).backward()
    assert_close(flat_gradient(model), expected)
    model.zero_grad()
    for x, y in batches:
        (CE(model(x), y) / 2).backward()
    penalty(model).backward()
    assert_close(flat_gradient(model), expected)


@pytest.mark.parametrize("mode", ["merged", "separate"])
def test_autocast_does_not_touch_the_penalty(mode: str) -> None:
    model, penalty, form = learned(mode)
    with torch.autocast("cpu", torch.bfloat16):
        value = penalty(model)
        value.backward()
    assert value.dtype == torch.float64
    assert_close(value.detach(), form.value(flat(model)))
    assert_close(flat_gradient(model), form.gradient(flat(model)))


def test_scaled_gradients_are_unscaled() -> None:
    """Mixed precision as in any training loop, with a scaler, in single precision."""
    model, penalty, form = learned()
    model, penalty = model.float(), penalty.float()
    x, y = task("grouped", 1)[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = CE(model(x.float()), y)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    alone = flat_gradient(model)
    optimizer.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = CE(model(x.float()), y) + penalty(model)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    difference = (flat_gradient(model) - alone).double()
    assert_close(difference, form.gradient(flat(model).double()), tolerance=1e-5)


@pytest.mark.parametrize("mode", ["merged", "separate"])
def test_functional_call(mode: str) -> None:
    model, penalty, form = learned(mode)
    x, y = task("grouped", 1)[0]

    def objective(parameters: Mapping[str, Tensor]) -> Tensor:
        return CE(functional_call(model, parameters, (x,)), y) + penalty(parameters)

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    gradients = torch.func.grad(objective)(parameters)
    expected = loss_gradient(model, x, y) + form.gradient(flat(model))
    assert_close(torch.cat([g.flatten() for g in gradients.values()]), expected)


@pytest.mark.parametrize("mode", ["merged", "separate"])
def test_vmap_over_an_ensemble(mode: str) -> None:
    model, penalty, form = learned(mode)
    generator = torch.Generator().manual_seed(1)
    thetas = torch.randn(3, len(form.anchor), generator=generator, dtype=torch.float64)
    members = [unflat(theta, shapes_of(model)) for theta in thetas]
    stacked = {name: torch.stack([m[name] for m in members]) for name in members[0]}
    values = torch.func.vmap(penalty)(stacked)
    assert_close(values, torch.stack([form.value(theta) for theta in thetas]))
    gradients = torch.func.vmap(torch.func.grad(penalty))(stacked)
    found = torch.cat([g.flatten(start_dim=1) for g in gradients.values()], dim=1)
    assert_close(found, torch.stack([form.gradient(theta) for theta in thetas]))
