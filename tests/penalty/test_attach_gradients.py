"""Attached penalties that add gradients, and what the updates cost."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.crossing import crossed
from tests.helpers.dense_steps import CASES
from tests.helpers.exact import exact_penalty
from tests.helpers.oracles import assert_close
from tests.helpers.penalties import CE, consolidated, flat, make, place, quadratic, task


def give(model: nn.Module, gradient: Tensor) -> None:
    sizes = [p.numel() for p in model.parameters()]
    for p, part in zip(model.parameters(), gradient.split(sizes), strict=True):
        p.grad = part.reshape(p.shape).clone()


def random_gradient(model: nn.Module, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(flat(model)), generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("case", "joint"), [(c, n % 2 == 1) for n, c in enumerate(CASES)])
def test_gradient_of_the_penalty_is_added(case: str, joint: bool) -> None:
    """For the optimizer alone; those that maximise get it taken away."""
    kind, options = CASES[case]
    model, penalty = consolidated("plain", 1, separate_weight_and_bias=not joint)
    form, start = quadratic(penalty, model, scale=2.5 / 9), flat(model)
    twin = copy.deepcopy(model)
    optimizer, reference = (kind(m.parameters(), **options) for m in (model, twin))
    penalty.attach(optimizer, model, "gradient")
    sign = -1.0 if options.get("maximize") else 1.0
    for step in range(6):
        gradient = random_gradient(model, step)
        give(model, gradient)
        give(twin, gradient + sign * form.gradient(flat(twin)))
        given = [(p.grad, p.grad.clone()) for p in model.parameters()]
        optimizer.step()
        reference.step()
        for p, (tensor, value) in zip(model.parameters(), given, strict=True):
            assert p.grad is tensor
            assert torch.equal(tensor, value)
    assert_close(flat(model) - start, flat(twin) - start, 1e-9)


@pytest.mark.parametrize("update", ["tangent", "gradient"])
def test_halves_that_are_frozen(update: str) -> None:
    """Also of a joint block: the other half feels where they are."""
    model, penalty = consolidated("plain", 1, separate_weight_and_bias=False)
    model[0].weight.requires_grad_(False)
    optimizer = SGD(model.parameters(), lr=0.1)
    form, frozen = quadratic(penalty, model, scale=2.5 / 9), model[0].weight.clone()
    penalty.attach(optimizer, model, update)
    centre = flat(model) + random_gradient(model, 0)
    for _ in range(400):
        give(model, flat(model) - centre)
        model[0].weight.grad = None
        optimizer.step()
    residual = flat(model) - centre + form.gradient(flat(model))
    assert torch.equal(model[0].weight, frozen)
    assert residual[20:].abs().max() < 1e-9
    assert residual[:20].abs().max() > 0.1


class Plane:
    """The tangent update on dense matrices, for a step size of one number."""

    def __init__(self, form: Any, theta: Tensor) -> None:
        self.form, self.contact, self.gradient = form, theta, form.gradient(theta)

    def refresh(self, theta: Tensor, size: float) -> Tensor:
        """Minimise `½ |θ' - θ|² + size · (penalty - plane)`, and touch there."""
        matrix = self.form.weight * self.form.matrix
        system = torch.eye(len(theta)).double() + size * matrix
        self.contact = self.contact + torch.linalg.solve(system, theta - self.contact)
        self.gradient = self.form.gradient(self.contact)
        return self.contact


@crossed(case=["sgd", "sgd-momentum", "sgd-decay"], every=[1, 3], joint=[False, True])
def test_tangent_plane(case: str, every: int, joint: bool) -> None:
    kind, options = CASES[case]
    model, penalty = consolidated("plain", 1, separate_weight_and_bias=not joint)
    form, start = quadratic(penalty, model, scale=2.5 / 9), flat(model)
    twin = copy.deepcopy(model)
    optimizer, reference = (kind(m.parameters(), **options) for m in (model, twin))
    penalty.attach(optimizer, model, "tangent", every)
    plane = Plane(form, flat(twin))
    sign = -1.0 if options.get("maximize") else 1.0
    momentum, dampening = options.get("momentum", 0.0), options.get("dampening", 0.0)
    size = every * options["lr"] * (1.0 - dampening) / (1.0 - momentum)
    for step in range(7):
        gradient = random_gradient(model, step)
        give(model, gradient)
        give(twin, gradient + sign * plane.gradient)
        optimizer.step()
        reference.step()
        if (step + 1) % every == 0:
            place(twin, plane.refresh(flat(twin), size))
    assert_close(flat(model) - start, flat(twin) - start, 1e-9)


@pytest.mark.parametrize("frozen", ["0.weight", None])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_tangent_that_is_flushed(steps: int, frozen: str | None) -> None:
    """By the size of the steps since the last plane, and after it the next one is full again."""
    model, penalty = consolidated("plain", 1)
    form, twin = quadratic(penalty, model, scale=2.5 / 9), copy.deepcopy(model)
    optimizer, reference = (SGD(m.parameters(), lr=0.1) for m in (model, twin))
    handle = penalty.attach(optimizer, model, "tangent", 3)
    plane, start = Plane(form, flat(twin)), flat(model)
    free = torch.cat([torch.full((p.numel(),), n != frozen) for n, p in model.named_parameters()])
    for count in (steps, 3):
        for step in range(count):
            gradient = random_gradient(model, step)
            for net, own in ((model, gradient), (twin, gradient + plane.gradient)):
                give(net, own)
                for name, p in net.named_parameters():
                    p.grad = None if name == frozen else p.grad
            optimizer.step()
            reference.step()
        optimizer.zero_grad()
        handle.flush()
        # Blocks are of one parameter each, so that one that is frozen has no part in the others.
        place(twin, torch.where(free, plane.refresh(flat(twin), 0.1 * count), flat(twin)))
        assert_close(flat(model) - start, flat(twin) - start, 1e-9)
        before = flat(model)
        handle.flush()
        assert torch.equal(flat(model), before)


def test_tangent_that_is_flushed_when_adam_has_forgotten_its_steps() -> None:
    model, penalty = consolidated("plain", 1)
    optimizer = Adam(model.parameters(), lr=0.1)
    handle = penalty.attach(optimizer, model, "tangent", 3)
    give(model, random_gradient(model, 0))
    optimizer.step()
    optimizer.state.clear()
    before = flat(model)
    handle.detach()
    assert torch.equal(flat(model), before)


def test_size_of_the_implicit_step_is_that_of_entries_that_moved() -> None:
    """From the anchor, where the plane has no gradient; Adam's size of the others is enormous."""
    model, penalty = make("plain"), exact_penalty(2.5, seed=3)
    penalty.consolidate(model, CE, task("plain", 0))
    form, twin = quadratic(penalty, model, scale=2.5 / 9), copy.deepcopy(model)
    optimizer, reference = (Adam(m.parameters(), lr=0.1) for m in (model, twin))
    penalty.attach(optimizer, model, "tangent", 3)
    start = flat(model)
    moving = random_gradient(model, 9) > 0
    for step in range(3):
        for net, stepped in ((model, optimizer), (twin, reference)):
            give(net, random_gradient(net, step) * moving)
            stepped.step()
    sizes = []
    for p in twin.parameters():
        v = reference.state[p]["exp_avg_sq"].flatten()
        own = 0.1 / ((v[v > 0] / (1.0 - 0.999**3)).sqrt() + 1e-8)
        sizes.append(torch.full((p.numel(),), 3 * float(own.log().mean().exp())))
    system = torch.eye(len(start)) + torch.cat(sizes).double()[:, None] * form.weight * form.matrix
    expected = torch.linalg.solve(system, flat(twin) - start)
    assert_close(flat(model) - start, expected, 1e-6)


@pytest.mark.parametrize(("case", "every"), [("sgd-nesterov", 5), ("adam", 1)])
def test_tangent_rests_where_the_gradients_cancel(case: str, every: int) -> None:
    """For a strength with which a gradient that is five steps old would be unstable."""
    kind, options = CASES[case]
    model, penalty = consolidated("plain", 1, strength=200.0)
    form = quadratic(penalty, model, scale=200.0 / 9)
    size = len(form.anchor)
    centre = flat(model) + random_gradient(model, 0)
    options = {k: v for k, v in options.items() if k != "weight_decay"}
    optimizer: Optimizer = kind(model.parameters(), **{**options, "lr": 0.02})
    penalty.attach(optimizer, model, "tangent", every)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.995)
    for _ in range(1500):
        give(model, flat(model) - centre)
        optimizer.step()
        scheduler.step()
    matrix = form.weight * form.matrix
    rest = torch.linalg.solve(torch.eye(size) + matrix, centre + matrix @ form.anchor)
    assert (flat(model) - rest).abs().max() < 1e-4
    assert (form.anchor - rest).abs().max() > 0.1


def test_tangent_starts_again_after_a_consolidation() -> None:
    model, penalty = make("plain"), exact_penalty(2.5, seed=3)
    optimizer = SGD(model.parameters(), lr=0.1)
    penalty.attach(optimizer, model, "tangent", 100)
    for done in range(3):
        pull: Tensor | float = 0.0
        if done:
            pull = quadratic(penalty, model, scale=2.5 / (8 + done)).gradient(flat(model))
        for step in range(3):
            before, gradient = flat(model), random_gradient(model, step)
            give(model, gradient)
            optimizer.step()
            assert_close(flat(model) - before, -0.1 * (gradient + pull), 1e-9)
        penalty.consolidate(model, CE, task("plain", done, 9 + done))


# --------------------------------------------------------------------------- what it costs


class Counting(TorchDispatchMode):
    """Counts products of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = str(function)
        self.products += any(f"aten.{kind}." in name for kind in ("mm", "bmm", "addmm", "matmul"))
        return function(*args, **(kwargs or {}))


def products(model: nn.Module, optimizer: Optimizer) -> int:
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with Counting() as counting:
        optimizer.step()
    return counting.products


@pytest.mark.parametrize(
    ("kind", "options", "update", "every", "expected"),
    [
        (Adam, {}, "rotated", 1, [4, 4, 4, 4]),
        (Adam, {"weight_decay": 0.1}, "rotated", 1, [4, 4, 4, 4]),
        (SGD, {}, "rotated", 1, [4, 4, 4, 4]),
        (SGD, {}, "rotated", 2, [0, 4, 0, 4]),
        (Adam, {}, "tangent", 2, [0, 4, 0, 4]),
        (Adam, {}, "gradient", 1, [4, 4, 4, 4]),
    ],
)
def test_products_of_a_step(
    kind: type[Optimizer], options: dict[str, Any], update: str, every: int, expected: list[int]
) -> None:
    """Of joint blocks with two bases, for each of two layers, after a first step."""
    model, penalty = consolidated("plain", 1, separate_weight_and_bias=False)
    optimizer = kind(model.parameters(), lr=0.01, **options)
    penalty.attach(optimizer, model, update, every)
    for _ in range(2):
        products(model, optimizer)
    assert [products(model, optimizer) / 2 for _ in range(4)] == expected


def test_products_are_those_of_what_has_moved() -> None:
    """Two more where something else has moved the parameters."""
    model, penalty = consolidated("plain", 1, separate_weight_and_bias=False)
    optimizer = Adam(model.parameters(), lr=0.01)
    penalty.attach(optimizer, model)
    assert products(model, optimizer) == 2 * 6
    with torch.no_grad():
        model[0].weight[0, 0] += 1.0
    assert products(model, optimizer) == 6 + 4
    assert products(model, optimizer) == 2 * 4
