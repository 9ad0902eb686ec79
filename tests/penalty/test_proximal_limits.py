"""Proximal steps in the limits: enormous strengths, many steps, small steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rotate_ewc import EKFACPenalty
from tests.helpers.oracles import assert_close
from tests.helpers.penalties import (
    CE,
    Quadratic,
    dense_quadratic,
    flat,
    make,
    move,
    shapes_of,
    task,
    unflat,
)


def moved(strength: float, **options: bool) -> tuple[nn.Module, EKFACPenalty, Quadratic]:
    model, penalty = make("plain"), EKFACPenalty(strength, fisher_type="type2", **options)
    penalty.consolidate(model, CE, task("plain", 0))
    move(model, 1, scale=1.0)
    (term,) = penalty.terms
    form = dense_quadratic(term.operator, term.anchor, shapes_of(model), strength / 9)
    return model, penalty, form


def after(penalty: EKFACPenalty, model: nn.Module, step_size: float, steps: int = 1) -> Tensor:
    """Where a number of steps lead to, from the model's parameters, which stay."""
    tensors = unflat(flat(model), shapes_of(model))
    for _ in range(steps):
        penalty.proximal_step_(tensors, step_size)
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


def test_enormous_strength_is_the_hard_constraint() -> None:
    """What matters to the old task returns to the anchor, what does not matter stays."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    inputs, targets = torch.randn(20, 4).double(), torch.randint(3, (20,))
    inputs[:, 2:] = 0.0
    penalty = EKFACPenalty(1e8, fisher_type="type2")
    penalty.consolidate(model, CE, [(inputs, targets)])
    move(model, 1, scale=1.0)
    (term,) = penalty.terms
    form = dense_quadratic(term.operator, term.anchor, shapes_of(model))
    spectrum, vectors = torch.linalg.eigh(form.matrix)
    free = vectors[:, spectrum < 1e-12 * spectrum.max()]
    assert free.shape[1] == 15 - 2 * 2 - 2  # two inputs, the bias, and logits up to a constant
    assert spectrum[free.shape[1]] > 1e-4
    before = flat(model)
    projected = form.anchor + free @ (free.T @ (before - form.anchor))
    for _ in range(3):
        penalty.proximal_step_(model, 0.1)
    assert_close(flat(model) - form.anchor, projected - form.anchor)
    assert penalty(model).item() < 1e-6


@pytest.mark.parametrize("strength", [1e8, 1e30, 1e38, 1e45, 1e300])
@pytest.mark.parametrize("step_size", [0.01, 10.0])
def test_single_precision_stays_finite(strength: float, step_size: float) -> None:
    """Eigenvalues of exactly zero, of words that never came, are still zero."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(6, 2), nn.Flatten(), nn.Linear(4, 3))
    words, targets = torch.randint(4, (30, 2)), torch.randint(3, (30,))
    penalty = EKFACPenalty(strength, fisher_type="type2")
    penalty.consolidate(model, CE, [(words, targets)])
    anchor = model[0].weight.detach().clone()
    start = anchor + 1.0
    with torch.no_grad():
        model[0].weight.copy_(start)
    for _ in range(3):
        penalty.proximal_step_(model, step_size)
    table = model[0].weight.detach()
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    torch.testing.assert_close(table[4:], start[4:])
    torch.testing.assert_close(table[:4], anchor[:4], rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("strength", [1.0, 1e4])
def test_repeated_steps_contract(strength: float, joint: bool) -> None:
    """In every eigendirection, towards the anchor and never past it."""
    model, penalty, form = moved(strength, separate_weight_and_bias=not joint)
    _, vectors = torch.linalg.eigh(form.matrix)
    last = vectors.T @ (flat(model) - form.anchor)
    value, rounding = penalty(model).item(), 1e-12
    for _ in range(10):
        penalty.proximal_step_(model, 0.5)
        now = vectors.T @ (flat(model) - form.anchor)
        assert (now.abs() - last.abs()).max() < rounding
        assert (now * last.sign()).min() > -rounding
        assert now.norm() < last.norm()
        assert penalty(model).item() < value
        last, value = now, penalty(model).item()


def test_many_small_steps_are_gradient_flow() -> None:
    """The error against `exp(-t F) (θ - θ*)` halves with the steps, as that of explicit ones."""
    model, penalty, form = moved(3.0)
    theta, time = flat(model), 2.0
    flow = torch.linalg.matrix_exp(-time * form.weight * form.matrix) @ (theta - form.anchor)
    errors = []
    for steps in (50, 100, 200):
        implicit = after(penalty, model, time / steps, steps) - form.anchor
        explicit = theta
        for _ in range(steps):
            explicit = explicit - time / steps * form.gradient(explicit)
        errors.append((implicit - flow).norm().item())
        # To first order, the two are wrong by as much in opposite directions.
        mean = (implicit + explicit - form.anchor) / 2
        assert (mean - flow).norm().item() < 0.1 * errors[-1]
    assert errors[0] / errors[1] == pytest.approx(2.0, rel=0.05)
    assert errors[1] / errors[2] == pytest.approx(2.0, rel=0.05)
    assert errors[-1] > 1e-6


def test_every_kth_step_with_k_times_the_size() -> None:
    """Not the same as k steps, but by something of second order only."""
    model, penalty, form = moved(3.0)
    k, differences = 5, []
    for step_size in (2e-3, 1e-3):
        once, often = after(penalty, model, k * step_size), after(penalty, model, step_size, k)
        system = torch.eye(len(form.anchor)).double() + k * step_size * form.weight * form.matrix
        delta = flat(model) - form.anchor
        assert_close(
            once - flat(model), form.anchor + torch.linalg.solve(system, delta) - flat(model)
        )
        differences.append((once - often).norm().item())
    assert differences[0] / differences[1] == pytest.approx(4.0, rel=0.05)
    assert differences[1] > 1e-8
