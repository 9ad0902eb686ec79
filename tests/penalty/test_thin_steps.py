"""Penalties of thin bases: their value and every update, against dense matrices."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from rotate_ewc import EKFACPenalty
from rotate_ewc.penalty.folding import _damped
from tests.helpers.crossing import crossed
from tests.helpers.dense_steps import CASES, advance, dense, draw
from tests.helpers.oracles import assert_close
from tests.helpers.penalties import (
    CE,
    MODELS,
    consolidated,
    dense_quadratic,
    flat,
    flat_gradient,
    hessian,
    quadratic,
    shapes_of,
    task,
    thinned,
)
from tests.helpers.thin import dense_groups, partial_traces, thin_block


def thin(name: str, tasks: int, rank: int, **options: Any) -> tuple[nn.Module, EKFACPenalty]:
    """A model that has moved away from its last anchor, and a penalty of thin bases."""
    model, penalty = consolidated(name, tasks, **options)
    thinned(penalty, rank)
    assert any(block.is_thin for term in penalty.terms for block in term.operator.blocks)
    return model, penalty


@crossed(name=MODELS, mode=["merged", "separate"], rank=[1, 2, 4])
def test_value_gradient_and_second_derivatives(name: str, mode: str, rank: int) -> None:
    model, penalty = thin(name, 2, rank, mode=mode)
    expected = [
        dense_quadratic(t.operator, t.anchor, shapes_of(model), 2.5 / 10 * t.weight)
        for t in penalty.terms
    ]
    theta = flat(model)
    value = penalty(model)
    value.backward()
    assert_close(value.detach(), sum(q.value(theta) for q in expected))
    assert_close(flat_gradient(model), sum(q.gradient(theta) for q in expected))
    assert_close(hessian(penalty, model), sum(q.weight * q.matrix for q in expected))


@crossed(
    name=MODELS,
    case=["sgd-nesterov", "adam", "adam-decay", "adamw", "rmsprop", "nadam"],
    rank=[1, 2, 4],
)
def test_rotated_and_proximal_steps(name: str, case: str, rank: int) -> None:
    """Torch's optimizers in the coordinates of bases that are written out, then the shrinking."""
    model, penalty = thin(name, 1, rank)
    kind, options = CASES[case]
    oracle, start = dense(penalty, model, kind, options), flat(model)
    optimizer = kind(model.parameters(), **options)
    with penalty.attach(optimizer, model):
        for step in range(8):
            expected = advance(oracle, draw(model, step), 2.5 / 9)
            optimizer.step()
        assert_close(flat(model) - start, expected - start, 1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_gradient_update(name: str) -> None:
    model, penalty = thin(name, 1, 2)
    term = quadratic(penalty, model, 2.5 / 9)
    optimizer, theta = SGD(model.parameters(), lr=0.05), flat(model)
    with penalty.attach(optimizer, model, "gradient"):
        for step in range(3):
            gradient = torch.cat([g.flatten() for g in draw(model, step)])
            theta = theta - 0.05 * (gradient + term.gradient(theta))
            optimizer.step()
    assert_close(flat(model), theta)


@pytest.mark.parametrize("name", MODELS)
def test_tangent_update(name: str) -> None:
    """With a plane that is renewed after every step, by the formula with dense matrices."""
    model, penalty = thin(name, 1, 2)
    scale, rate = 2.5 / 9, 0.05
    term = quadratic(penalty, model, 1.0)
    matrix, theta = term.matrix, flat(model)
    plane = matrix @ (theta - term.anchor)
    optimizer = SGD(model.parameters(), lr=rate)
    eye = torch.eye(len(theta), dtype=torch.float64)
    with penalty.attach(optimizer, model, "tangent", every=1):
        for step in range(3):
            gradient = torch.cat([g.flatten() for g in draw(model, step)])
            moved = -rate * (gradient + scale * plane)
            change = torch.linalg.solve(eye + rate * scale * matrix, matrix @ moved)
            theta, plane = theta + moved - rate * scale * change, plane + change
            optimizer.step()
    assert_close(flat(model), theta)


def test_largest_curvature() -> None:
    model, penalty = thin("plain", 2, 2)
    largest = torch.linalg.eigvalsh(hessian(penalty, model)).max()
    assert penalty.max_curvature == pytest.approx(float(largest), rel=1e-9)


def test_separate_tasks_of_other_ranks_add_up() -> None:
    model, penalty = consolidated("plain", 3, mode="separate")
    first, second, third = penalty.terms
    thinned(penalty, 2)
    terms = [first, penalty.terms[1], penalty.terms[2]]
    penalty._replace_terms(terms, 3, 9, 9.0)
    expected = sum(
        dense_quadratic(t.operator, t.anchor, shapes_of(model), 2.5 / 9 * t.weight).value(
            flat(model)
        )
        for t in terms
    )
    assert_close(penalty(model).detach(), torch.as_tensor(expected))
    assert second.operator.blocks[0].shape == third.operator.blocks[0].shape


class DeadInputs(nn.Module):
    """Inputs 0, 3 and 5 are never on, and output 1 of the hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 6), nn.Linear(6, 3)
        mask = torch.ones(8)
        mask[[0, 3, 5]] = 0.0
        hidden = torch.ones(6)
        hidden[1] = 0.0
        self.register_buffer("mask", mask)
        self.register_buffer("hidden", hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x * self.mask).tanh() * self.hidden)


@pytest.mark.parametrize(
    ("rank", "dtype", "steps"),
    [
        (1, torch.float64, 300),
        (3, torch.float32, 300),
        pytest.param(3, torch.float32, 4_000, marks=pytest.mark.slow),
    ],
)
def test_what_is_never_on_stays_where_it_is(rank: int, dtype: torch.dtype, steps: int) -> None:
    """Over thousands of steps of Adam, in which rounding errors would become full steps."""
    torch.manual_seed(0)
    model = DeadInputs().to(dtype)
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(32, 8, generator=generator).to(dtype)
    targets = torch.randint(3, (32,), generator=generator)
    penalty = EKFACPenalty(1.0, fisher_type="type2")
    for _ in range(2):
        penalty.consolidate(model, CE, [(inputs, targets)])
        thinned(penalty, rank)
    before = copy.deepcopy(model)
    optimizer = Adam(model.parameters(), lr=1e-3)
    with penalty.attach(optimizer, model):
        for step in range(steps):
            batch = slice(step % 4 * 8, step % 4 * 8 + 8)
            optimizer.zero_grad()
            CE(model(inputs[batch]), targets[batch]).backward()
            optimizer.step()
    moved = (model.first.weight - before.first.weight).abs()
    assert moved[:, [0, 3, 5]].max() <= 1e-6
    assert moved[1].max() <= 1e-6
    assert moved[0, [1, 2, 4, 6, 7]].max() > 1e-3
    assert (model.second.weight - before.second.weight)[:, 1].abs().max() <= 1e-6


@pytest.mark.parametrize("update", ["rotated", "tangent", "gradient"])
@pytest.mark.parametrize("kind", [Adam, SGD])
def test_resumed_runs_end_in_the_same_bits(kind: type[Optimizer], update: str) -> None:
    def start() -> tuple[nn.Module, EKFACPenalty, Optimizer, Any]:
        model, penalty = consolidated("plain", 2, "auto")
        thinned(penalty, 2)
        optimizer = kind(model.parameters(), lr=0.01)
        return model, penalty, optimizer, penalty.attach(optimizer, model, update)

    def train(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            x, y = task("plain", step)[0]
            CE(model(x), y).backward()
            optimizer.step()

    whole = start()
    train(whole[0], whole[2], range(12))
    states = [copy.deepcopy(part.state_dict()) for part in whole]
    train(whole[0], whole[2], range(12, 24))
    resumed = start()
    for part, state in zip(resumed, states, strict=True):
        part.load_state_dict(state)
    train(resumed[0], resumed[2], range(12, 24))
    assert torch.equal(flat(resumed[0]), flat(whole[0]))
    assert resumed[1].strength == whole[1].strength


def test_strength_is_found_in_the_coordinates_of_the_block() -> None:
    """The part of the progress that is kept is what was asked for, from dense coordinates."""
    model, penalty = thin("plain", 1, 2, strength="auto", plasticity=0.7)
    kind, options = CASES["adam"]
    oracle = dense(penalty, model, kind, options)
    basis, values = oracle.at.basis, oracle.at.eigenvalues
    optimizer = kind(model.parameters(), **options)
    with penalty.attach(optimizer, model):
        gradients = draw(model, 0)
        whole = torch.cat([g.flatten() for g in gradients])
        rotated = basis.T @ whole
        optimizer.step()
    # Adam's first step is η g / |g| with η m = s.
    eps, rate = options["eps"], options["lr"]
    sizes = rate / (rotated.abs() + eps)
    gains = sizes * rotated.square()
    kept = (gains / (1.0 + sizes * penalty.scale * values)).sum() / gains.sum()
    places = _places(model)
    own = [values[p].pow(1.5).sum() / values[p].sqrt().sum() for p in places]
    met = sum((gains[p] * values[p]).sum() / o for p, o in zip(places, own, strict=True))
    overlap = min(1.0, float(met / gains.sum()))
    assert float(kept) == pytest.approx(1.0 - 0.3 * overlap**1.4, abs=2e-3)


def _places(model: nn.Module) -> list[slice]:
    ends = torch.tensor([p.numel() for p in model.parameters()]).cumsum(0).tolist()
    return [slice(a, b) for a, b in zip([0, *ends], ends, strict=False)]


def test_damping_is_by_the_means_over_all_directions() -> None:
    block = thin_block((2, 4, 5), (2, 3), seed=1)
    damped = _damped(block, 4.0, 0.1)
    dense, expected = dense_groups(damped, (4, 5)), dense_groups(block, (4, 5))
    mean = sum(np.trace(4.0 * matrix) for matrix in expected) / 40
    for got, matrix in zip(dense, expected, strict=True):
        _, of_inputs = partial_traces(4.0 * matrix, (4, 5))
        added = np.kron(np.eye(4), of_inputs / 4) + mean * np.eye(20)
        np.testing.assert_allclose(got, 4.0 * matrix + 0.1 * added, atol=1e-12)
