"""Where attached penalties come to rest: at the stationary points of loss plus penalty."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adadelta, Adam, Optimizer
from torch.optim.lr_scheduler import ExponentialLR

from rotate_ewc.penalty.displacement import without_rounding_errors_
from rotate_ewc.penalty.step_rules import rule_of
from tests.helpers.dense_steps import CASES
from tests.helpers.exact import exact_penalty
from tests.helpers.penalties import CE, Quadratic, consolidated, flat, quadratic, task


def settling(kind: type[Optimizer], options: dict[str, Any]) -> dict[str, Any]:
    """Options with which rounding errors of gradients that are zero make no steps to speak of."""
    if kind is SGD:
        return options
    if kind is Adadelta:  # whose own averages take long to settle otherwise
        return {**options, "eps": 10.0, "rho": 0.5}
    return {**options, "eps": 0.1}


# A centred RMSprop whose gradients do not change divides by nothing but rounding errors; the others
# that are left out make the steps of one that is here in another way.
LEFT_OUT = ("rmsprop-centered", "sgd-fused", "adam-tensor", "adam-fused", "adamw-fused")
SETTLING = {
    name: (kind, settling(kind, options))
    for name, (kind, options) in CASES.items()
    if name not in LEFT_OUT and "maximize" not in options
}


def bowl(size: int, seed: int = 0) -> Quadratic:
    """A quadratic loss."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(size, size, generator=generator, dtype=torch.float64)
    centre = torch.randn(size, generator=generator, dtype=torch.float64)
    return Quadratic(root @ root.T / size + torch.eye(size), centre)


def minimum(loss: Quadratic, penalty: Quadratic, decay: float) -> Tensor:
    """Where the gradients of loss, penalty and `½ decay |θ|²` cancel."""
    size = len(loss.anchor)
    system = loss.matrix + penalty.weight * penalty.matrix + decay * torch.eye(size).double()
    pulls = loss.matrix @ loss.anchor + penalty.weight * penalty.matrix @ penalty.anchor
    return torch.linalg.solve(system, pulls)


def place(model: nn.Module, vector: Tensor) -> None:
    sizes = [p.numel() for p in model.parameters()]
    with torch.no_grad():
        for p, part in zip(model.parameters(), vector.split(sizes), strict=True):
            p.copy_(part.reshape(p.shape))


def give(model: nn.Module, gradient: Tensor) -> None:
    """Give a model a gradient."""
    sizes = [p.numel() for p in model.parameters()]
    for p, part in zip(model.parameters(), gradient.split(sizes), strict=True):
        p.grad = part.reshape(p.shape).clone()


@pytest.mark.parametrize("case", SETTLING)
def test_stays_where_the_gradients_cancel(case: str) -> None:
    """Once its averages have settled there; coupled weight decay is a part of the loss."""
    kind, options = SETTLING[case]
    model, penalty = consolidated("plain", 1, strength=20.0)
    form = quadratic(penalty, model, scale=20.0 / 9)
    loss = bowl(len(form.anchor))
    coupled = not (kind.__name__ == "AdamW" or options.get("decoupled_weight_decay"))
    decay = options.get("weight_decay", 0.0)
    options = options if coupled else {**options, "weight_decay": 0.0}
    rest = minimum(loss, form, decay if coupled else 0.0)
    optimizer = kind(model.parameters(), **options)
    penalty.attach(optimizer, model)
    for _ in range(110):
        place(model, rest)
        give(model, loss.gradient(rest))
        optimizer.step()
    for _ in range(5):
        give(model, loss.gradient(rest))
        optimizer.step()
    assert (flat(model) - rest).abs().max() < 1e-10
    assert (form.gradient(rest)).abs().max() > 0.1


@pytest.mark.parametrize(
    ("case", "strength"), [("sgd", 1e4), ("sgd-momentum", 1.0), ("sgd-nesterov", 1e4)]
)
def test_goes_where_the_gradients_cancel(case: str, strength: float) -> None:
    model, penalty = consolidated("plain", 1, strength)
    form = quadratic(penalty, model, scale=strength / 9)
    loss = bowl(len(form.anchor))
    kind, options = CASES[case]
    optimizer = kind(model.parameters(), **options)
    penalty.attach(optimizer, model)
    for _ in range(500):
        give(model, loss.gradient(flat(model)))
        optimizer.step()
    gradient = loss.gradient(flat(model)) + form.gradient(flat(model))
    torch.testing.assert_close(flat(model), minimum(loss, form, 0.0), rtol=0.0, atol=1e-10)
    assert gradient.abs().max() < 1e-9 * max(strength, 1.0)


@pytest.mark.parametrize("kind", [Adam])
def test_goes_there_with_steps_of_every_size(kind: type[Optimizer]) -> None:
    """While the learning rate falls to nothing. Without the penalty it goes elsewhere."""
    model, penalty = consolidated("plain", 1, 20.0)
    form = quadratic(penalty, model, scale=20.0 / 9)
    loss = bowl(len(form.anchor))
    free = copy.deepcopy(model)
    for net, attached in ((model, True), (free, False)):
        optimizer = kind(net.parameters(), lr=0.5, eps=1e-3)
        if attached:
            penalty.attach(optimizer, net)
        scheduler = ExponentialLR(optimizer, 0.985)
        for _ in range(1000):
            give(net, loss.gradient(flat(net)))
            optimizer.step()
            scheduler.step()
    rest = minimum(loss, form, 0.0)
    assert (flat(model) - rest).abs().max() < 1e-7
    assert (flat(free) - rest).abs().max() > 0.1


@pytest.mark.parametrize("case", CASES)
def test_rules_tell_the_step_of_a_constant_gradient(case: str) -> None:
    kind, options = CASES[case]
    changes = {"maximize": False, "weight_decay": 0.0}
    parameter = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]).double())
    optimizer = kind([parameter], **{**options, **changes})
    gradient, rule = torch.tensor([0.3, -1.0, 2.0]).double(), rule_of(optimizer)
    assert rule is not None
    for _ in range(200):
        before = parameter.detach().clone()
        parameter.grad = gradient.clone()
        optimizer.step()
    size = rule.size(optimizer.param_groups[0], optimizer.state[parameter])
    # Adadelta's steps grow for ever, but slowly.
    tolerance = 0.02 if "adadelta" in case else 1e-7
    expected = (before - parameter.detach()) / gradient
    actual = torch.as_tensor(size, dtype=torch.float64).expand(3)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=0.0)


@pytest.mark.parametrize("steps", [200, pytest.param(4_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("kind", "examples"), [(Adam, 6), (Adam, 60), (SGD, 6)])
def test_dead_inputs_stay_where_they_are(kind: type[Optimizer], examples: int, steps: int) -> None:
    """Rounding errors of gradients that are exactly zero are no gradients.

    Also where there are fewer examples than inputs, so that others have no variance either.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
    inputs = torch.randn(2, examples, 12)
    inputs[:, :, ::4] = 0.0
    targets = torch.randint(3, (2, examples))
    penalty = exact_penalty(3.0, seed=0)
    penalty.consolidate(model, CE, [(inputs[0], targets[0])])
    optimizer = kind(model.parameters(), lr=1e-2)
    penalty.attach(optimizer, model)
    before = model[0].weight.detach().clone()
    for _ in range(steps):
        optimizer.zero_grad()
        CE(model(inputs[1]), targets[1]).backward()
        optimizer.step()
    moved = (model[0].weight.detach() - before).abs().amax(0)
    assert moved[::4].max() < 1e-6
    assert moved[1] > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [1, 5])
def test_rounding_errors_of_rotated_matrices(rank: int, dtype: torch.dtype) -> None:
    """Whole numbers, whose rows and columns are exactly in the span of some basis vectors."""
    generator = torch.Generator().manual_seed(rank)
    left, right = (
        torch.randint(-8, 9, (2, size, rank), generator=generator).double() for size in (40, 60)
    )
    bases = [
        torch.linalg.qr(torch.cat([part, torch.randn(
            2, size, size - rank, generator=generator).double()], dim=2))[0].to(dtype)
        for part, size in ((left, 40), (right, 60))
    ]  # fmt: skip
    gradient = (left @ right.mT).to(dtype)
    gradient[1] *= 1e-6
    cleaned = without_rounding_errors_(bases[0].mT @ gradient @ bases[1])
    expected = bases[0].mT.double() @ gradient.double() @ bases[1].double()
    assert not cleaned[:, rank:].any()
    assert not cleaned[:, :, rank:].any()
    assert cleaned[:, :rank, :rank].count_nonzero() > 1.9 * rank**2 - 1
    limit = 1e-5 * expected.abs().amax((1, 2), keepdim=True)
    assert ((cleaned - expected).abs() < limit).all()


@pytest.mark.parametrize("kind", [SGD, Adam])
def test_directions_without_a_gradient_are_no_steps(kind: type[Optimizer]) -> None:
    """Also those that are along no axis: of two equal inputs, and of three equal outputs."""
    torch.manual_seed(0)
    model, loss = nn.Linear(6, 5), nn.MSELoss()
    inputs, targets = torch.randn(2, 40, 6), torch.randn(2, 40, 5)
    inputs[:, :, 1], targets[:, :, 1:3] = inputs[:, :, 0], targets[:, :, :1]
    with torch.no_grad():
        model.weight[1:3], model.bias[1:3] = model.weight[0], model.bias[0]
    penalty = exact_penalty(3.0, fisher_type="empirical")
    penalty.consolidate(model, loss, [(inputs[0], targets[0])])
    optimizer = kind(model.parameters(), lr=1e-2)
    penalty.attach(optimizer, model)
    before = model.weight.detach().clone()
    for _ in range(200):
        optimizer.zero_grad()
        loss(model(inputs[1]), targets[1]).backward()
        optimizer.step()
    moved = model.weight.detach() - before
    assert moved.abs().max() > 0.05
    assert (moved[:, 0] - moved[:, 1]).abs().max() < 1e-5
    assert (moved[0] - moved[1:3]).abs().max() < 1e-5


def test_task_is_learned_and_remembered() -> None:
    """By the one line that a user writes."""
    torch.manual_seed(0)
    model, penalty = nn.Linear(4, 3).double(), exact_penalty(3.0)
    optimizer = Adam(model.parameters(), lr=0.05)
    handle = penalty.attach(optimizer, model)
    tasks = [task("plain", seed, 30) for seed in range(2)]
    for data in tasks:
        for _ in range(60):
            for inputs, targets in data:
                optimizer.zero_grad()
                CE(model(inputs), targets).backward()
                optimizer.step()
        penalty.consolidate(model, CE, data)
    handle.detach()
    model.requires_grad_(False)
    losses = [sum(float(CE(model(x), y)) for x, y in data) / 2 for data in tasks]
    assert max(losses) < 1.1
