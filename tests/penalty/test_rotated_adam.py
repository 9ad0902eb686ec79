"""`RotatedAdam` against torch's Adam on the dense coordinates `z = Qᵀ(θ - θ*)`."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable, Sequence
from itertools import permutations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import ExponentialLR, LambdaLR, LRScheduler, OneCycleLR

from rotate_ewc import EKFACPenalty, RotatedAdam
from rotate_ewc.penalty.state import PenaltyState
from rotate_ewc.penalty.step_size import step_sizes_of
from rotate_ewc.penalty.terms import Term
from tests.helpers.dense_adam import Dense, advance, coordinates, dense, theta
from tests.helpers.oracles import assert_close, dense_operator
from tests.helpers.penalties import (
    CE,
    MODELS,
    SUMMED,
    Batches,
    consolidated,
    dense_quadratic,
    flat,
    flat_gradient,
    make,
    move,
    shapes_of,
    task,
)
from tests.helpers.random_operators import RandomOperator, random_operators

# --------------------------------------------------------------------------- what is optimised


def draw(model: nn.Module, seed: int, without: Sequence[str] = ()) -> list[Tensor | None]:
    """Give a model random gradients, some of its parameters none."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        gradient = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        p.grad = None if name in without else gradient
    return [p.grad for p in model.parameters()]


def backward(model: nn.Module, data: Batches) -> list[Tensor | None]:
    """Give a model the gradient of its loss on the first batch."""
    model.zero_grad()
    CE(model(data[0][0]), data[0][1]).backward()
    return [p.grad for p in model.parameters()]


def place(model: nn.Module, vector: Tensor) -> None:
    """Set the parameters of a model."""
    with torch.no_grad():
        for p, part in zip(
            model.parameters(), vector.split([p.numel() for p in model.parameters()]), strict=True
        ):
            p.copy_(part.reshape(p.shape))


def follow(
    optimizer: RotatedAdam, oracle: Dense, scale: float, steps: int = 4, seed: int = 0
) -> None:
    """Compare steps with random gradients."""
    model, start = optimizer.model, flat(optimizer.model)
    for step in range(steps):
        gradients = draw(model, 100 * seed + step)
        expected = advance(oracle, gradients, scale)
        optimizer.step()
        assert_close(flat(model) - start, expected - start)


def counts(optimizer: Optimizer) -> list[int]:
    """How many steps the averages of each parameter have seen; none of those without any."""
    return [int(state["step"]) for state in optimizer.state.values() if state]


def everything(optimizer: RotatedAdam) -> dict[str, Any]:
    """A copy of all that a step may change."""
    return copy.deepcopy(
        {
            "parameters": [p.detach() for p in optimizer.model.parameters()],
            "gradients": [p.grad for p in optimizer.model.parameters()],
            "optimizer": optimizer.state_dict(),
        }
    )


def assert_same(actual: Any, expected: Any) -> None:
    """Compare nested values bit for bit."""
    if isinstance(expected, Tensor):
        assert torch.equal(actual.to_dense(), expected.to_dense())
    elif isinstance(expected, dict):
        assert list(actual) == list(expected)
        for key, value in expected.items():
            assert_same(actual[key], value)
    elif isinstance(expected, (list, tuple)):
        for one, other in zip(actual, expected, strict=True):
            assert_same(one, other)
    else:
        assert actual == expected


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_the_oracle_is_in_the_eigenbasis(name: str, joint: bool) -> None:
    model, penalty = consolidated(name, 2, separate_weight_and_bias=not joint)
    at = coordinates(penalty, model)
    (term,) = penalty.terms
    form = dense_quadratic(term.operator, term.anchor, shapes_of(model))
    assert_close(at.basis.T @ at.basis, torch.eye(len(at.anchor)).double())
    assert_close(at.basis @ at.eigenvalues.diag() @ at.basis.T, form.matrix)
    assert torch.equal(at.anchor, form.anchor)


# --------------------------------------------------------------------------- plain Adam


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lr": 0.3},
        {"lr": 0.03, "betas": (0.5, 0.9), "eps": 1e-3},
        {"lr": 0.03, "betas": [0.0, 0.99]},
        {"lr": 0.03, "betas": (0.0, 0.0), "eps": 0.1},
        {"lr": torch.tensor(0.03, dtype=torch.float64)},
    ],
)
@pytest.mark.parametrize("penalty", [None, EKFACPenalty(1e6)])
def test_is_adam_before_the_first_task(
    penalty: EKFACPenalty | None, options: dict[str, Any]
) -> None:
    model, twin, data = make("plain"), make("plain"), task("plain", 0)
    start = flat(model)
    optimizer = RotatedAdam(model, penalty, **options)
    reference = Adam(twin.parameters(), **options)
    for _ in range(20):
        backward(model, data)
        optimizer.step()
        backward(twin, data)
        reference.step()
        assert_close(flat(model) - start, flat(twin) - start, 1e-9)


def split(model: nn.Module) -> list[dict[str, Any]]:
    """Groups of parameters with options of their own."""
    return [
        {"params": model[0].parameters(), "lr": 0.1},
        {"params": [model[2].weight], "betas": (0.5, 0.9)},
        {"params": [model[2].bias], "eps": 1e-2},
    ]


def cycle(optimizer: Optimizer) -> LRScheduler:
    """Changes betas, too."""
    return OneCycleLR(optimizer, max_lr=0.1, total_steps=20)


def falling(optimizer: Optimizer) -> LRScheduler:
    return ExponentialLR(optimizer, 0.8)


def from_zero(optimizer: Optimizer) -> LRScheduler:
    return LambdaLR(optimizer, lambda step: step / 10)


@pytest.mark.parametrize("schedule", [cycle, falling, from_zero])
def test_groups_and_schedules(schedule: Callable[[Optimizer], LRScheduler]) -> None:
    model, twin, data = make("plain"), make("plain"), task("plain", 0)
    start = flat(model)
    optimizer = RotatedAdam(model, lr=0.02, params=split(model))
    reference = Adam(split(twin), lr=0.02)
    schedulers = schedule(optimizer), schedule(reference)
    for _ in range(15):
        backward(model, data)
        optimizer.step()
        backward(twin, data)
        reference.step()
        for scheduler in schedulers:
            scheduler.step()
    assert_close(flat(model) - start, flat(twin) - start, 1e-9)
    for group, other in zip(optimizer.param_groups, reference.param_groups, strict=True):
        assert group["lr"] == other["lr"]
        assert tuple(group["betas"]) == tuple(other["betas"])


@pytest.mark.parametrize("tasks", [0, 1])
def test_closure(tasks: int) -> None:
    """It may compute gradients although a step does not, and its result is returned."""
    model, penalty = consolidated("plain", tasks)
    twin = copy.deepcopy(model)
    inputs, targets = task("plain", 5)[0]
    optimizer, reference = RotatedAdam(model, penalty), RotatedAdam(twin, penalty)
    losses = []

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = CE(model(inputs), targets)
        loss.backward()
        losses.append(loss)
        return loss

    for _ in range(3):
        assert optimizer.step(closure) is losses[-1]
        backward(twin, task("plain", 5))
        assert reference.step() is None
    assert losses[-1].requires_grad
    assert torch.equal(flat(model), flat(twin))


def test_parameters_to_be_optimised() -> None:
    """All that require gradients, or those that are given."""
    model = make("plain")
    model[0].bias.requires_grad_(False)
    (group,) = RotatedAdam(model).param_groups
    assert [id(p) for p in group["params"]] == [
        id(p) for p in model.parameters() if p.requires_grad
    ]
    (group,) = RotatedAdam(model, params=iter([model[2].bias])).param_groups
    assert [id(p) for p in group["params"]] == [id(model[2].bias)]
    optimizer = RotatedAdam(model, params=[model[2].bias])
    optimizer.add_param_group({"params": model[2].weight, "lr": 0.5})
    before = flat(model[0])
    draw(model, 0)
    optimizer.step()
    assert torch.equal(flat(model[0]), before)
    assert counts(optimizer) == [1, 1]


@pytest.mark.parametrize("tasks", [0, 2])
@pytest.mark.parametrize("without", [["0.weight"], ["0.weight", "0.bias", "2.bias"]])
def test_parameters_without_a_gradient_are_left_alone(without: list[str], tasks: int) -> None:
    model, penalty = consolidated("plain", tasks)
    oracle, start = dense(penalty, model), flat(model)
    optimizer = RotatedAdam(model, penalty, lr=0.1)
    versions = {name: p._version for name, p in model.named_parameters()}
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(3):
        expected = advance(oracle, draw(model, step, without), 2.5 / (8 + tasks) if tasks else 0.0)
        optimizer.step()
    assert_close(flat(model) - start, expected - start)
    for name, p in model.named_parameters():
        assert (p._version == versions[name]) == (name in without)
        assert torch.equal(p, values[name]) == (name in without)
        assert bool(optimizer.state.get(p)) != (name in without)


def test_nothing_to_do() -> None:
    """Without any gradient, nothing is changed."""
    model, penalty = consolidated("plain")
    optimizer, before = RotatedAdam(model, penalty), flat(model)
    optimizer.step()
    assert torch.equal(flat(model), before)
    assert counts(optimizer) == []


@pytest.mark.parametrize("tasks", [0, 1])
@pytest.mark.parametrize("name", MODELS)
def test_changes_parameters_in_place_and_nothing_else(name: str, tasks: int) -> None:
    """Neither gradients, nor the penalty's tensors, nor where the parameters are stored."""
    model, penalty = consolidated(name, tasks)
    optimizer = RotatedAdam(model, penalty)
    values = copy.deepcopy(draw(model, 0))
    gradients = [p.grad for p in model.parameters()]
    pointers = [p.data_ptr() for p in model.parameters()]
    state = copy.deepcopy(penalty.state_dict())
    for _ in range(2):
        optimizer.step()
    for p, gradient, value, pointer in zip(
        model.parameters(), gradients, values, pointers, strict=True
    ):
        assert p.grad is gradient
        assert torch.equal(p.grad, value)
        assert p.data_ptr() == pointer
        assert p.is_leaf
        assert p.requires_grad
        assert not any(torch.as_tensor(t).requires_grad for t in optimizer.state[p].values())
    assert_same(dict(penalty.state_dict()), dict(state))


# --------------------------------------------------------------------------- with a penalty


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_is_adam_in_the_eigenbasis_and_a_proximal_step(
    name: str, joint: bool, tasks: int, real: bool
) -> None:
    """With random gradients, or those of a loss wherever the oracle is."""
    model, penalty = consolidated(name, tasks, separate_weight_and_bias=not joint)
    twin, data, start = copy.deepcopy(model), task(name, 9), flat(model)
    # An ε that is not less than the rounding errors of gradients that are zero.
    options: dict[str, Any] = {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-4}
    oracle, optimizer = dense(penalty, model, **options), RotatedAdam(model, penalty, **options)
    for step in range(6):
        if real:
            backward(model, data)
            place(twin, theta(oracle))
            gradients = backward(twin, data)
        else:
            gradients = draw(model, step)
        expected = advance(oracle, gradients, 2.5 / (8 + tasks))
        optimizer.step()
        assert_close(flat(model) - start, expected - start, 1e-9)
    assert (flat(model) - start).abs().max() > 0.05


@pytest.mark.parametrize("loss", [CE, SUMMED])
@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_scale_is_that_of_the_penalty(weighting: str, loss: nn.Module) -> None:
    model, penalty = consolidated("plain", 2, loss=loss, weighting=weighting, decay=0.7)
    penalty.current_num_data = 25
    at = coordinates(penalty, model)
    unscaled = at.basis @ (at.eigenvalues * (at.basis.T @ (flat(model) - at.anchor)))
    penalty(model).backward()
    scale = float(flat_gradient(model) @ unscaled / unscaled.square().sum())
    assert_close(flat_gradient(model), scale * unscaled)
    follow(RotatedAdam(model, penalty, lr=0.1), dense(penalty, model), scale)


@pytest.mark.parametrize("name", MODELS)
def test_strength_of_zero_is_adam_in_the_eigenbasis(name: str) -> None:
    model, penalty = consolidated(name, strength=0.0)
    plain = copy.deepcopy(model)
    follow(RotatedAdam(model, penalty, lr=0.1), dense(penalty, model), 0.0)
    optimizer = RotatedAdam(plain, lr=0.1)
    for step in range(4):
        draw(plain, step)
        optimizer.step()
    assert (flat(model) - flat(plain)).abs().max() > 0.01


def test_learning_rates_of_groups_and_their_schedule() -> None:
    """The step size is that of the moment."""
    model, penalty = consolidated("plain", 2)
    rates = [0.1, 0.02, 0.3, 0.0]
    oracle = dense(penalty, model, rates)
    groups = [{"params": [p], "lr": lr} for p, lr in zip(model.parameters(), rates, strict=True)]
    optimizer = RotatedAdam(model, penalty, params=groups)
    schedulers, start = (falling(optimizer), falling(oracle.adam)), flat(model)
    for step in range(5):
        expected = advance(oracle, draw(model, step), 2.5 / 10)
        optimizer.step()
        assert_close(flat(model) - start, expected - start)
        for scheduler in schedulers:
            scheduler.step()
    torch.testing.assert_close(flat(model)[-3:], start[-3:], rtol=1e-13, atol=1e-14)


def test_wrapped_models() -> None:
    """The penalty knows the parameters by the names inside."""
    model, penalty = consolidated("plain", 2)
    wrapped = nn.DataParallel(model)
    follow(RotatedAdam(wrapped, penalty, lr=0.1), dense(penalty, model), 2.5 / 10)


class Odd(nn.Module):
    """Words that are read and said, a diagonal layer, a single number, and a wide convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(6, 4)
        self.norm = nn.LayerNorm(4)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.filter = nn.Conv2d(1, 2, (2, 2))
        self.mixed = nn.Linear(12, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        seen = self.norm(self.words(tokens)) * self.scale
        features = self.mixed(self.filter(seen[:, None]).flatten(1).tanh())
        return F.linear(features, self.words.weight)


@pytest.mark.parametrize("joint", [False, True])
def test_diagonal_tied_and_scalar_parameters(joint: bool) -> None:
    """The first have no basis at all, so that nothing is rotated but all could be aliased."""
    torch.manual_seed(0)
    model = Odd().double()
    model.filter.to(memory_format=torch.channels_last)
    penalty = EKFACPenalty(2.5, fisher_type="type2", separate_weight_and_bias=not joint)
    for t in range(2):
        penalty.consolidate(model, CE, [(x.clamp(max=4), y) for x, y in task("transposed", t)])
        move(model, t)
    state = copy.deepcopy(penalty.state_dict())
    follow(RotatedAdam(model, penalty, lr=0.1), dense(penalty, model), 2.5 / 9)
    assert_same(dict(penalty.state_dict()), dict(state))


@pytest.mark.parametrize("graph", [False, True])
def test_gradients_that_cannot_be_written_to(graph: bool) -> None:
    """Expanded ones, and those that have a gradient function themselves."""
    model, penalty = consolidated("plain")
    oracle, start = dense(penalty, model), flat(model)
    optimizer = RotatedAdam(model, penalty, lr=0.1)
    parameters = list(model.parameters())
    value = sum(p.sum() + 0.1 * p.square().sum() for p in parameters)
    slopes = torch.autograd.grad(value, parameters, create_graph=True)
    for p, slope in zip(parameters, slopes, strict=True):
        p.grad = slope if graph else torch.ones(1, dtype=p.dtype).expand(p.shape)
    expected = advance(oracle, [p.grad.detach() for p in model.parameters()], 2.5 / 9)
    optimizer.step()
    assert_close(flat(model) - start, expected - start)
    model.zero_grad()


# --------------------------------------------------------------------------- coming to rest


def regression(strength: float, joint: bool) -> tuple[nn.Linear, EKFACPenalty, Tensor, Tensor]:
    """Softmax regression after a task, and a second task that differs."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    penalty = EKFACPenalty(strength, fisher_type="type2", separate_weight_and_bias=not joint)
    inputs, targets = torch.randn(2, 30, 4).double() + 0.5, torch.randint(3, (2, 30))
    penalty.consolidate(model, CE, [(inputs[0], targets[0])])
    return model, penalty, inputs[1], targets[1]


def residual(model: nn.Module, penalty: EKFACPenalty, inputs: Tensor, targets: Tensor) -> float:
    """Largest entry of the gradient of loss and penalty together."""
    model.zero_grad()
    (CE(model(inputs), targets) + penalty(model)).backward()
    return max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None)


def minimise(model: nn.Module, penalty: EKFACPenalty, inputs: Tensor, targets: Tensor) -> None:
    """Find the minimum of loss and penalty by another method."""
    optimizer = torch.optim.LBFGS(
        [p for p in model.parameters() if p.requires_grad], max_iter=300, history_size=30,
        tolerance_grad=1e-13, tolerance_change=0.0, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = CE(model(inputs), targets) + penalty(model)
        value.backward()
        return value

    optimizer.step(closure)


def train(
    optimizer: Optimizer, model: nn.Module, inputs: Tensor, targets: Tensor, steps: int = 1500
) -> None:
    """Train on the loss alone, with a learning rate that falls to nothing."""
    scheduler = ExponentialLR(optimizer, 0.99)
    for _ in range(steps):
        optimizer.zero_grad()
        CE(model(inputs), targets).backward()
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    "strength",
    [3.0, *(pytest.param(strength, marks=pytest.mark.slow) for strength in (0.3, 100.0))],
)
@pytest.mark.parametrize("joint", [False, True])
def test_comes_to_rest_where_the_gradients_cancel(joint: bool, strength: float) -> None:
    """Adam with proximal steps of a mean size does not."""
    model, penalty, inputs, targets = regression(strength, joint)
    best, other, before = copy.deepcopy(model), copy.deepcopy(model), flat(model)
    train(RotatedAdam(model, penalty, lr=0.05), model, inputs, targets)
    assert residual(model, penalty, inputs, targets) < 1e-7
    minimise(best, penalty, inputs, targets)
    assert residual(best, penalty, inputs, targets) < 1e-7
    torch.testing.assert_close(flat(model), flat(best), rtol=0.0, atol=1e-6)
    assert (flat(model) - before).abs().max() > 1e-3

    adam = Adam(other.parameters(), lr=0.05)

    def proximal(*_: Any) -> None:
        sizes = step_sizes_of(adam, dict(other.named_parameters()), adam.param_groups[0]["lr"])
        penalty.proximal_step_(other, sizes)

    adam.register_step_post_hook(proximal)
    train(adam, other, inputs, targets, 500)
    assert residual(other, penalty, inputs, targets) > 1e-3


@pytest.mark.parametrize("frozen", ["bias", "weight"])
def test_comes_to_rest_with_half_of_a_block_frozen(frozen: str) -> None:
    """Where the halves have blocks of their own."""
    model, penalty, inputs, targets = regression(3.0, joint=False)
    move(model, 0)
    model.get_parameter(frozen).requires_grad_(False)
    train(RotatedAdam(model, penalty, lr=0.05), model, inputs, targets)
    assert residual(model, penalty, inputs, targets) < 1e-7


# --------------------------------------------------------------------------- any strength


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("strength", [1e8, 1e30, 1e45, 1e300, 1.7e308])
@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_any_strength(strength: float, weighting: str, dtype: torch.dtype) -> None:
    """What old tasks know does not move; words that never came do, as in the oracle."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(6, 2), nn.Flatten(), nn.Linear(4, 3)).to(dtype)
    words, targets = torch.randint(4, (30, 2)), torch.randint(3, (30,))
    penalty = EKFACPenalty(strength, fisher_type="type2", weighting=weighting)
    penalty.consolidate(model, CE, [(words, targets)])
    before, at = flat(model), coordinates(penalty, model)
    free = dense(penalty, model)
    optimizer = RotatedAdam(model, penalty, lr=0.1)
    for step in range(5):
        expected = advance(free, draw(model, step), 0.0)
        optimizer.step()
        assert bool(flat(model).isfinite().all())
    moved = at.basis.T @ (flat(model) - before).double()
    stiff, null = at.eigenvalues > 1e-4, at.eigenvalues == 0
    assert stiff.sum() >= 6
    assert null.sum() == 4
    tolerance = 1e-5 if dtype == torch.float32 else 1e-6
    assert moved[stiff].abs().max() < tolerance
    assert_close(moved[null], (at.basis.T @ (expected - before.double()))[null], tolerance)
    assert moved[null].abs().min() > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_learning_rate_of_zero_at_any_strength(dtype: torch.dtype) -> None:
    """Nothing moves but by rounding, however strong the penalty is."""
    model, penalty = consolidated("plain", strength=1e300)
    model.to(dtype)
    penalty.to(dtype)
    optimizer, before = RotatedAdam(model, penalty, lr=0.0), flat(model)
    for step in range(3):
        draw(model, step)
        optimizer.step()
    rounding = 10 * torch.finfo(dtype).eps
    torch.testing.assert_close(flat(model), before, rtol=rounding, atol=rounding)


def test_gradients_of_zero_are_no_obstacle() -> None:
    """√v is zero, and the step size η / ε: finite, and what is protected returns."""
    model, penalty = consolidated("plain", strength=1e8)
    at = coordinates(penalty, model)
    optimizer, before = RotatedAdam(model, penalty, lr=0.1), flat(model) - at.anchor
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    after = flat(model) - at.anchor
    stiff = at.eigenvalues > 1e-6
    assert (at.basis.T @ before)[stiff].abs().max() > 0.1
    assert (at.basis.T @ after)[stiff].abs().max() < 1e-6


# --------------------------------------------------------------------------- starting anew


@pytest.mark.parametrize("tasks", [0, 1])
@pytest.mark.parametrize("options", [{}, {"exclude": ["0.*"]}])
def test_averages_start_anew_after_a_consolidation(options: dict[str, Any], tasks: int) -> None:
    """Those of parameters that are not protected, too."""
    model, penalty = consolidated("plain", tasks, **options)
    optimizer = RotatedAdam(model, penalty, lr=0.1)
    for t in range(tasks, tasks + 2):
        follow(optimizer, dense(penalty, model), 2.5 / (8 + t) if t else 0.0, 3, seed=t)
        assert counts(optimizer) == [3] * 4
        penalty.consolidate(model, CE, task("plain", t, 9 + t))
    follow(optimizer, dense(penalty, model), 2.5 / (8 + t + 1), 1)
    assert counts(optimizer) == [1] * 4


def test_parameters_that_had_no_gradient_start_anew() -> None:
    """Whenever they have one again."""
    model, penalty = consolidated("plain")
    optimizer = RotatedAdam(model, penalty, lr=0.1)
    draw(model, 0)
    optimizer.step()
    penalty.consolidate(model, CE, task("plain", 1))
    draw(model, 1, ["0.weight", "0.bias"])
    optimizer.step()
    assert counts(optimizer) == [1, 1]
    oracle, start = dense(penalty, model), flat(model)
    gradients = draw(model, 2, ["2.weight", "2.bias"])
    optimizer.step()
    assert_close(flat(model) - start, advance(oracle, gradients, 2.5 / 9) - start)


def stronger(penalty: EKFACPenalty) -> None:
    penalty.strength = 7.5


def more_examples(penalty: EKFACPenalty) -> None:
    penalty.current_num_data = 3


def to_another_place(penalty: EKFACPenalty) -> None:
    penalty.to("cpu", torch.float64)


def reloaded(penalty: EKFACPenalty) -> None:
    penalty.load_state_dict(copy.deepcopy(penalty.state_dict()))


def failed(penalty: EKFACPenalty) -> None:
    with pytest.raises(ValueError, match="loss_func"):
        penalty.consolidate(make("plain"), nn.MultiMarginLoss(), task("plain", 1))


def nothing_at_all(penalty: EKFACPenalty) -> None:
    penalty(make("plain"))


@pytest.mark.parametrize(
    ("interrupt", "scale"),
    [
        (stronger, 7.5 / 9),
        (more_examples, 2.5 / 3),
        (to_another_place, 2.5 / 9),
        (reloaded, 2.5 / 9),
        (failed, 2.5 / 9),
        (nothing_at_all, 2.5 / 9),
    ],
)
def test_averages_go_on_after_anything_else(
    interrupt: Callable[[EKFACPenalty], None], scale: float
) -> None:
    model, penalty = consolidated("plain")
    oracle, optimizer = dense(penalty, model), RotatedAdam(model, penalty, lr=0.1)
    follow(optimizer, oracle, 2.5 / 9, 3)
    interrupt(penalty)
    follow(optimizer, oracle, scale, 3, seed=1)
    assert counts(optimizer) == [6] * 4


def test_group_added_during_a_task() -> None:
    """The averages of the other parameters go on."""
    model, penalty = consolidated("plain")
    optimizer = RotatedAdam(model, penalty, lr=0.1, params=model[0].parameters())
    for step in range(2):
        draw(model, step)
        optimizer.step()
    optimizer.add_param_group({"params": model[2].parameters()})
    draw(model, 2)
    optimizer.step()
    assert counts(optimizer) == [3, 3, 1, 1]


def test_penalty_that_is_set_later() -> None:
    """It starts to act with the next step; averages taken in the old basis are forgotten."""
    model, penalty = consolidated("plain")
    optimizer = RotatedAdam(model, lr=0.1)
    assert optimizer.penalty is None
    follow(optimizer, dense(EKFACPenalty(), model), 0.0, 2)
    optimizer.penalty = penalty
    assert optimizer.penalty is penalty
    follow(optimizer, dense(penalty, model), 2.5 / 9, 2)
    assert counts(optimizer) == [2] * 4
    optimizer.penalty = penalty  # the same one may be set again


# --------------------------------------------------------------------------- growth


def grown(classes: int = 4) -> nn.Sequential:
    """A larger output layer, and a layer behind it."""
    torch.manual_seed(1)
    layers = [nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, classes), nn.Linear(classes, 2)]
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.filterwarnings("ignore:.*has grown, but does not begin with:UserWarning")
def test_new_rows_and_new_layers_follow_adam(joint: bool) -> None:
    """And are protected, too, once they have been consolidated."""
    penalty = EKFACPenalty(2.5, separate_weight_and_bias=not joint)
    penalty.consolidate(make("plain"), CE, task("plain", 0))
    for classes in (4, 6):
        model, plain = grown(classes), grown(classes)
        optimizer, adam = RotatedAdam(model, penalty, lr=0.1), Adam(plain.parameters(), lr=0.1)
        old = penalty.terms[0].anchor["2.bias"].shape[0]
        follow(optimizer, dense(penalty, model), 2.5 / 9)
        for step in range(4):
            draw(plain, step)
            adam.step()
        torch.testing.assert_close(model[2].weight[old:], plain[2].weight[old:])
        torch.testing.assert_close(model[2].bias[old:], plain[2].bias[old:])
        torch.testing.assert_close(flat(model[3]), flat(plain[3]))
        assert (model[2].weight[:old] - plain[2].weight[:old]).abs().max() > 1e-2
        penalty.consolidate(model[:3], CE, task("plain", 1, classes=classes))
        move(model, 1)
        follow(optimizer, dense(penalty, model), 2.5 / 9, seed=1)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.filterwarnings("ignore:.*has grown, but does not begin with:UserWarning")
def test_new_inputs_and_new_outputs(joint: bool) -> None:
    """A layer between two that have grown has grown along both axes."""
    penalty = EKFACPenalty(2.5, separate_weight_and_bias=not joint)
    penalty.consolidate(make("plain"), CE, task("plain", 0))
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 4)).double()
    optimizer = RotatedAdam(model, penalty, lr=0.1)
    follow(optimizer, dense(penalty, model), 2.5 / 9)
    penalty.consolidate(model, CE, task("plain", 1, classes=4))
    follow(optimizer, dense(penalty, model), 2.5 / 9)
    assert penalty.terms[0].anchor["2.weight"].shape == (4, 7)


def test_new_words() -> None:
    """A block that is transposed grows along its other axis."""
    penalty = EKFACPenalty(2.5)
    model = make("transposed")
    penalty.consolidate(model, CE, task("transposed", 0))
    words = nn.Embedding(8, 4).double()
    with torch.no_grad():
        words.weight[:6] = model[0].weight
    model[0] = words
    optimizer = RotatedAdam(model, penalty, lr=0.1)
    follow(optimizer, dense(penalty, model), 2.5 / 9)
    penalty.consolidate(model, CE, task("transposed", 1))
    follow(optimizer, dense(penalty, model), 2.5 / 9)


def test_parameters_grown_in_place() -> None:
    """After a consolidation, when no average of the old size is left."""
    model, penalty = consolidated("plain")
    optimizer = RotatedAdam(model, penalty, lr=0.1)
    follow(optimizer, dense(penalty, model), 2.5 / 9, 2)
    penalty.consolidate(model, CE, task("plain", 1))
    model.zero_grad()
    with torch.no_grad():
        for p in model[2].parameters():
            p.data = torch.cat([p, torch.ones(2, *p.shape[1:]).double()])
    follow(optimizer, dense(penalty, model), 2.5 / 9, 2)


# --------------------------------------------------------------------------- left out


def test_excluded_parameters_follow_adam() -> None:
    model, penalty = consolidated("plain", exclude=["0.weight", "2.bias"])
    plain = copy.deepcopy(model)
    follow(RotatedAdam(model, penalty, lr=0.1), dense(penalty, model), 2.5 / 9)
    adam = Adam(plain.parameters(), lr=0.1)
    for step in range(4):
        draw(plain, step)
        adam.step()
    torch.testing.assert_close(model[0].weight, plain[0].weight)
    torch.testing.assert_close(model[2].bias, plain[2].bias)
    assert (model[2].weight - plain[2].weight).abs().max() > 1e-2


def without_bias(model: nn.Module) -> None:
    model[2].bias = None


def with_fewer_rows(model: nn.Module) -> None:
    with torch.no_grad():
        model[2].weight = nn.Parameter(model[2].weight[:2].clone())
        model[2].bias = nn.Parameter(model[2].bias[:2].clone())


def with_fewer_columns(model: nn.Module) -> None:
    with torch.no_grad():
        model[2].weight = nn.Parameter(model[2].weight[:, :3].clone())


@pytest.mark.parametrize("change", [without_bias, with_fewer_rows, with_fewer_columns])
@pytest.mark.parametrize("joint", [False, True])
def test_not_strict_leaves_parameters_to_adam(
    joint: bool, change: Callable[[nn.Module], None]
) -> None:
    """With one warning for each that does not fit any more; the first layer is still protected."""
    whole, penalty = consolidated("plain", strict=False, separate_weight_and_bias=not joint)
    oracle, start, model = dense(penalty, whole), flat(whole[0]), copy.deepcopy(whole)
    change(model)
    plain = copy.deepcopy(model)
    optimizer, adam = RotatedAdam(model, penalty, lr=0.1), Adam(plain.parameters(), lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(3):
            expected = advance(oracle, draw(whole, step), 2.5 / 9)
            for each in (model, plain):
                draw(each, step)
            optimizer.step()
            adam.step()
    told = [str(warning.message).split("'")[1] for warning in caught]
    assert 1 <= len(told) == len(set(told))
    assert set(told) <= {"2.weight", "2.bias"}
    assert all("not protected any more" in str(warning.message) for warning in caught)
    assert_close(flat(model[0]) - start, expected[: len(start)] - start)
    for name in set(told) & set(shapes_of(model)):
        torch.testing.assert_close(model.get_parameter(name), plain.get_parameter(name))


@pytest.mark.parametrize("change", [without_bias, with_fewer_rows, with_fewer_columns])
@pytest.mark.parametrize("joint", [False, True])
def test_what_was_left_out_can_be_consolidated_again(
    joint: bool, change: Callable[[nn.Module], None]
) -> None:
    model, penalty = consolidated("plain", strict=False, separate_weight_and_bias=not joint)
    change(model)
    model[2] = nn.Sequential(model[2], nn.Linear(len(model[2].weight), 3)).double()
    if change is with_fewer_columns:
        model[1] = nn.Sequential(nn.Tanh(), nn.Linear(5, 3)).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        penalty.consolidate(model, CE, task("plain", 1))
    move(model, 1)
    follow(RotatedAdam(model, penalty, lr=0.1), dense(penalty, model), 2.5 / 9)


# --------------------------------------------------------------------------- half of a block


def half_trained(joint: bool, half: str, how: str) -> tuple[RotatedAdam, nn.Parameter]:
    """An optimizer after a step, and a parameter of the last layer that is to have none."""
    model, penalty = consolidated("plain", separate_weight_and_bias=not joint)
    kept = model.get_parameter(f"2.{half}")
    chosen = [p for p in model.parameters() if p is not kept or how != "not given"]
    optimizer = RotatedAdam(model, penalty, lr=0.1, params=chosen)
    kept.requires_grad_(how != "frozen")
    return optimizer, kept


HOW = ["frozen", "not given", "without gradient"]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("half", ["weight", "bias"])
def test_half_of_a_layer_is_not_touched(half: str, how: str) -> None:
    """Bit for bit, wherever it is; the other half and the other layer move."""
    optimizer, kept = half_trained(False, half, how)
    model, name, version = optimizer.model, f"2.{half}", kept._version
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for step in range(3):
        draw(model, step, [] if how == "not given" else [name])
        optimizer.step()
    assert kept._version == version
    assert not optimizer.state.get(kept)
    for n, p in model.named_parameters():
        assert torch.equal(p, before[n]) == (n == name)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("half", ["weight", "bias"])
def test_half_of_a_joint_block_is_refused(half: str, how: str) -> None:
    """The coordinates mix both halves; nothing changes until both are trained, or none is."""
    optimizer, _ = half_trained(True, half, how)
    model, name, other = optimizer.model, f"2.{half}", "2.bias" if half == "weight" else "2.weight"
    draw(model, 0, [] if how == "not given" else [name])
    before = everything(optimizer)
    message = rf"parameter '{name}' has no gradient, .*'{other}'.*: no step of these alone is right"
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert_same(everything(optimizer), before)

    last = flat(model[2])
    draw(model, 0, ["2.weight", "2.bias"])
    optimizer.step()
    assert torch.equal(flat(model[2]), last)
    if how == "not given":
        optimizer.add_param_group({"params": [model.get_parameter(name)], "lr": 0.1})
    draw(model, 1)
    optimizer.step()
    assert not torch.equal(flat(model[2]), last)
    assert sorted(counts(optimizer)) == [1, 1, 2, 2]


@pytest.mark.parametrize(
    ("option", "value"), [("lr", 0.0), ("lr", 0.2), ("betas", (0.9, 0.9)), ("eps", 1e-3)]
)
def test_options_of_a_joint_block(option: str, value: Any) -> None:
    """One for both halves; other blocks may have others."""
    model, penalty = consolidated("plain", separate_weight_and_bias=False)
    first, last = model[0].parameters(), model[2].parameters()
    optimizer = RotatedAdam(model, penalty, params=[{"params": first, option: value}])
    optimizer.add_param_group({"params": last})
    draw(model, 0)
    optimizer.step()
    weights, biases = ([m.weight for m in (model[0], model[2])], [model[0].bias, model[2].bias])
    groups = [{"params": weights}, {"params": biases, option: value}]
    optimizer = RotatedAdam(model, penalty, params=groups)
    before = everything(optimizer)
    with pytest.raises(ValueError, match=rf"joint block have different {option} \('0.weight' has"):
        optimizer.step()
    assert_same(everything(optimizer), before)


def test_equal_options_of_a_joint_block() -> None:
    """Written in another way."""
    model, penalty = consolidated("plain", separate_weight_and_bias=False)
    weights, biases = ([m.weight for m in (model[0], model[2])], [model[0].bias, model[2].bias])
    groups = [
        {"params": weights, "lr": 0.1, "betas": (0.9, 0.999)},
        {"params": biases, "lr": torch.tensor(0.1, dtype=torch.float64), "betas": [0.9, 0.999]},
    ]
    oracle, start = dense(penalty, model), flat(model)
    optimizer = RotatedAdam(model, penalty, params=groups)
    expected = advance(oracle, draw(model, 0), 2.5 / 9)
    optimizer.step()
    assert_close(flat(model) - start, expected - start)


@pytest.mark.parametrize(
    ("joint", "half"), [(True, None), (False, None), (False, "weight"), (False, "bias")]
)
def test_without_a_gradient_the_penalty_does_not_grow(joint: bool, half: str | None) -> None:
    """Proximal steps are all that is left of a step where the gradient is zero."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    penalty = EKFACPenalty(10.0, fisher_type="type2", separate_weight_and_bias=not joint)
    penalty.consolidate(model, CE, [(torch.randn(200, 4).double(), torch.randint(3, (200,)))])
    move(model, 0)
    optimizer = RotatedAdam(model, penalty, lr=1e-9)
    values = [penalty(model).item()]
    for _ in range(10):
        for name, p in model.named_parameters():
            p.grad = None if name == half else torch.zeros_like(p)
        optimizer.step()
        values.append(penalty(model).item())
    assert values == sorted(values, reverse=True)
    assert values[-1] < 0.9 * values[0]


# --------------------------------------------------------------------------- checkpoints


def through_a_file(state: dict[str, Any]) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def go_on(optimizer: RotatedAdam, penalty: EKFACPenalty) -> None:
    """Finish this task, and begin another."""
    for seed in (50, 60):
        for step in range(2):
            draw(optimizer.model, seed + step)
            optimizer.step()
        if seed == 50:
            penalty.consolidate(optimizer.model, CE, task("plain", 5))


@pytest.mark.parametrize("moment", ["before the first task", "within a task", "between tasks"])
@pytest.mark.parametrize("order", list(permutations(["model", "penalty", "optimizer"])))
def test_checkpoints_continue_bit_for_bit(order: Sequence[str], moment: str) -> None:
    model, penalty = consolidated("plain", int(moment != "before the first task"))
    optimizer = RotatedAdam(model, penalty, lr=0.1, betas=(0.8, 0.9))
    for step in range(3):
        draw(model, step)
        optimizer.step()
    if moment == "between tasks":
        penalty.consolidate(model, CE, task("plain", 4))
    saved = {
        "model": model.state_dict(),
        "penalty": penalty.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    saved = through_a_file(saved)
    again, loaded = make("plain", seed=7), EKFACPenalty(2.5, seed=3)
    resumed = RotatedAdam(again, loaded, lr=0.5)
    into: dict[str, Any] = {"model": again, "penalty": loaded, "optimizer": resumed}
    for name in order:
        into[name].load_state_dict(saved[name])
    assert torch.equal(flat(again), flat(model))
    go_on(optimizer, penalty)
    go_on(resumed, loaded)
    assert torch.equal(flat(again), flat(model))
    assert_same(resumed.state_dict(), optimizer.state_dict())


def test_checkpoint_of_an_optimizer_that_gets_its_penalty_later() -> None:
    """As one inside Avalanche does."""
    model, penalty = consolidated("plain")
    optimizer = RotatedAdam(model, penalty, lr=0.1)
    for step in range(3):
        draw(model, step)
        optimizer.step()
    again = copy.deepcopy(model)
    resumed = RotatedAdam(again, lr=0.1)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    loaded = EKFACPenalty(2.5, seed=3)
    loaded.load_state_dict(through_a_file(penalty.state_dict()))
    resumed.penalty = loaded
    go_on(optimizer, penalty)
    go_on(resumed, loaded)
    assert torch.equal(flat(again), flat(model))


def pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
@pytest.mark.parametrize("tasks", [0, 1])
def test_copies_keep_what_belongs_together(tasks: int, copied: Callable[[Any], Any]) -> None:
    model, penalty = consolidated("plain", tasks)
    optimizer = RotatedAdam(model, penalty, lr=0.1)
    scheduler = falling(optimizer)
    for step in range(3):
        draw(model, step)
        optimizer.step()
        scheduler.step()
    before = everything(optimizer)
    again, kept, resumed = copied((model, penalty, optimizer))
    assert resumed.model is again
    assert resumed.penalty is kept
    for group, other in zip(resumed.param_groups, optimizer.param_groups, strict=True):
        assert group["lr"] == other["lr"] < 0.1
        assert [id(p) for p in group["params"]] == [id(p) for p in again.parameters()]
    go_on(resumed, kept)
    assert_same(everything(optimizer), before)
    go_on(optimizer, penalty)
    assert torch.equal(flat(again), flat(model))
    assert_same(resumed.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_copy_of_the_optimizer_alone(copied: Callable[[Any], Any]) -> None:
    """It brings its own model and penalty, and leaves the others alone."""
    model, penalty = consolidated("plain")
    optimizer, before = RotatedAdam(model, penalty, lr=0.1), flat(model)
    other = copied(optimizer)
    assert other.model is not model
    assert other.penalty is not penalty
    go_on(other, other.penalty)
    assert torch.equal(flat(model), before)
    assert penalty.num_tasks == 1
    go_on(optimizer, penalty)
    assert torch.equal(flat(model), flat(other.model))


def test_state_of_adam_can_be_loaded() -> None:
    """Before the first task the two are the same, also in what they remember."""
    model, twin = make("plain"), make("plain")
    adam = Adam(twin.parameters(), lr=0.1)
    for step in range(6):
        draw(twin, step)
        adam.step()
        if step == 2:
            place(model, flat(twin))
            optimizer = RotatedAdam(model, EKFACPenalty(), lr=0.5)
            optimizer.load_state_dict(through_a_file(adam.state_dict()))
        elif step > 2:
            draw(model, step)
            optimizer.step()
    torch.testing.assert_close(flat(model), flat(twin))


# --------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message", "error"),
    [
        ({"penalty": 0.01}, "penalty is float; expected an EKFACPenalty", TypeError),
        ({"penalty": EKFACPenalty}, "penalty is type; expected an EKFACPenalty", TypeError),
        (
            {"penalty": EKFACPenalty(1.0, "separate")},
            "penalty has mode 'separate'; expected 'merged'",
            ValueError,
        ),
        ({"lr": -0.1}, "lr is -0.1; expected a finite number of at least 0", ValueError),
        ({"lr": float("nan")}, "lr is nan; expected", ValueError),
        ({"lr": float("inf")}, "lr is inf; expected", ValueError),
        ({"lr": "0.1"}, "lr is '0.1'; expected a number", TypeError),
        ({"lr": None}, "lr is None; expected a number", TypeError),
        ({"lr": True}, "lr is True; expected a number", TypeError),
        ({"lr": torch.tensor(-1.0)}, "lr is -1.0; expected", ValueError),
        ({"lr": torch.ones(2)}, r"lr is tensor\(.*; expected a number", TypeError),
        ({"eps": 0.0}, "eps is 0; expected more", ValueError),
        ({"eps": -1e-8}, "eps is -1e-08; expected", ValueError),
        ({"eps": None}, "eps is None; expected", TypeError),
        ({"betas": 0.9}, "betas is 0.9; expected two numbers", TypeError),
        ({"betas": (0.9,)}, r"betas is \(0.9,\); expected two numbers", TypeError),
        ({"betas": "ab"}, "betas is 'ab'; expected two numbers", TypeError),
        ({"betas": (1.0, 0.9)}, r"betas\[0\] is 1.0; expected less than 1", ValueError),
        ({"betas": (0.9, 1.5)}, r"betas\[1\] is 1.5; expected less than 1", ValueError),
        ({"betas": (0.9, -0.1)}, r"betas\[1\] is -0.1; expected", ValueError),
        ({"betas": (float("nan"), 0.9)}, r"betas\[0\] is nan; expected", ValueError),
        ({"weight_decay": 0.1}, "weight_decay is 0.1; expected none", ValueError),
        ({"betas": (0.9, None)}, r"betas\[1\] is None; expected", TypeError),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str, error: type[Exception]) -> None:
    """In the constructor, in a group of parameters, and in a group that is added."""
    model = make("plain")
    if "weight_decay" not in arguments:
        with pytest.raises(error, match=message):
            RotatedAdam(model, **arguments)
    if "penalty" in arguments:
        return
    with pytest.raises(error, match=message):
        RotatedAdam(model, params=[{"params": model[0].parameters(), **arguments}])
    optimizer = RotatedAdam(model, params=model[0].parameters())
    before = everything(optimizer)
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": model[2].parameters(), **arguments})
    assert_same(everything(optimizer), before)


@pytest.mark.parametrize("model", [None, [], "model", nn.Parameter(torch.ones(2))])
def test_models_that_are_none(model: Any) -> None:
    got = type(model).__name__
    with pytest.raises(TypeError, match=rf"model is {got}; expected a torch.nn.Module"):
        RotatedAdam(model)


def test_parameters_of_a_model_are_no_model() -> None:
    with pytest.raises(TypeError, match=r"model is generator; expected a torch.nn.Module \(not"):
        RotatedAdam(make("plain").parameters())


@pytest.mark.parametrize(
    ("penalty", "message", "error"),
    [
        (EKFACPenalty(), "has another penalty already; expected one that was made", ValueError),
        (None, "has another penalty already; expected one that was made", ValueError),
        (EKFACPenalty(1.0, "separate"), "mode 'separate'; expected 'merged'", ValueError),
        (nn.Linear(1, 1), "penalty is Linear; expected an EKFACPenalty", TypeError),
    ],
)
def test_penalty_is_kept(penalty: Any, message: str, error: type[Exception]) -> None:
    model, own = consolidated("plain")
    optimizer = RotatedAdam(model, own)
    with pytest.raises(error, match=message):
        optimizer.penalty = penalty
    assert optimizer.penalty is own


def sparse(model: nn.Module) -> None:
    p = model[2].weight
    p.grad = torch.ones_like(p).to_sparse()


def of_another_model(model: nn.Module) -> None:
    """Replaced after the optimizer was made."""
    with torch.no_grad():
        model[2].bias = nn.Parameter(model[2].bias.clone())


def of_another_place(model: nn.Module) -> None:
    """All of them: Adam would not notice."""
    for module in (model[0], model[2]):
        module.bias = nn.Parameter(module.bias.detach().clone())
        module.weight = nn.Parameter(module.weight.detach().clone())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (sparse, r"parameter '2.weight' has a sparse gradient; expected a dense one"),
        (of_another_model, r"a parameter of shape \[3\] is the optimizer's but not the model's"),
        (of_another_place, r"a parameter of shape \[5, 4\] is the optimizer's but not the model's"),
        (without_bias, r"'2.bias' is protected by the penalty, but the model has no such"),
        (with_fewer_rows, r"'2.weight' has shape \[2, 5\], but the penalty protects \[3, 5\]"),
    ],
)
@pytest.mark.parametrize("pending", [False, True])
def test_steps_that_fail_change_nothing(
    spoil: Callable[[nn.Module], None], message: str, pending: bool
) -> None:
    """Not even the averages that a consolidation has made obsolete."""
    model, penalty = consolidated("plain")
    optimizer = RotatedAdam(model, penalty, lr=0.1)
    draw(model, 0)
    optimizer.step()
    if pending:
        penalty.consolidate(model, CE, task("plain", 1))
    removed = model[2].bias
    draw(model, 1)
    spoil(model)
    if spoil in (without_bias, with_fewer_rows):
        # Out of the optimizer as well, so that it is the penalty that misses them.
        kept = {id(p) for p in model.parameters()}
        (group,) = optimizer.param_groups
        group["params"] = [p for p in group["params"] if id(p) in kept]
        optimizer.state = type(optimizer.state)(
            dict, {p: state for p, state in optimizer.state.items() if id(p) in kept}
        )
        assert id(removed) not in kept
    before, state = everything(optimizer), copy.deepcopy(penalty.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert_same(everything(optimizer), before)
    assert_same(dict(penalty.state_dict()), dict(state))


def test_sparse_gradients_of_an_embedding() -> None:
    """Also before the first task."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(6, 2, sparse=True), nn.Flatten(), nn.Linear(4, 3))
    optimizer = RotatedAdam(model)
    words, targets = torch.randint(6, (5, 2)), torch.randint(3, (5,))
    CE(model(words), targets).backward()
    before = flat(model)
    with pytest.raises(ValueError, match=r"parameter '0.weight' has a sparse gradient"):
        optimizer.step()
    assert torch.equal(flat(model), before)
    assert counts(optimizer) == []


def test_penalty_on_another_device_is_named() -> None:
    model, penalty = consolidated("plain")
    optimizer, before = RotatedAdam(model, penalty), flat(model)
    draw(model, 0)
    penalty.to("meta")
    with pytest.raises(ValueError, match=r"is on cpu, but the penalty on meta; call penalty.to"):
        optimizer.step()
    assert torch.equal(flat(model), before)
    assert counts(optimizer) == []


# --------------------------------------------------------------------------- precision


@pytest.mark.parametrize("tasks", [0, 2])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_single_and_half_precision(dtype: torch.dtype, tolerance: float, tasks: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
    penalty = EKFACPenalty(2.5, seed=3)
    for t in range(tasks):
        penalty.consolidate(model, CE, [(x.to(dtype), y) for x, y in task("plain", t)])
    oracle, start = dense(penalty, model, eps=1e-3), flat(model).double()
    optimizer = RotatedAdam(model, penalty, lr=0.1, eps=1e-3)
    for step in range(5):
        expected = advance(oracle, draw(model, step), 2.5 / 9 if tasks else 0.0)
        optimizer.step()
    assert flat(model).dtype == dtype
    assert_close(flat(model).double() - start, expected - start, tolerance)
    for state in optimizer.state.values():
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_not_lost_on_the_way(dtype: torch.dtype) -> None:
    """What is rotated back and forth without a step is rounded to where it was."""
    torch.manual_seed(0)
    model, penalty = nn.Linear(64, 32).to(dtype), EKFACPenalty(2.5, separate_weight_and_bias=False)
    penalty.consolidate(model, CE, [(torch.randn(60, 64).to(dtype), torch.randint(32, (60,)))])
    move(model, 0)
    optimizer, before = RotatedAdam(model, penalty, lr=0.0, eps=1e-3), flat(model)
    draw(model, 0)
    optimizer.step()
    torch.testing.assert_close(flat(model).float(), before.float(), rtol=0.0, atol=1e-6)


def single() -> tuple[nn.Module, EKFACPenalty, Tensor, Tensor]:
    """A model in float32, after a task."""
    torch.manual_seed(0)
    model, penalty = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), EKFACPenalty(2.5)
    inputs, targets = torch.randn(12, 4), torch.randint(3, (12,))
    penalty.consolidate(model, CE, [(inputs, targets)])
    return model, penalty, inputs + 1.0, targets


def test_step_under_autocast_is_in_full_precision() -> None:
    model, penalty, inputs, targets = single()
    twin = copy.deepcopy(model)
    for each, inside in ((model, True), (twin, False)):
        optimizer = RotatedAdam(each, penalty, lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = CE(each(inputs), targets)
            loss.backward()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
                optimizer.step()
    assert torch.equal(flat(model), flat(twin))


def test_gradient_scaler() -> None:
    """Scales by powers of two leave no trace, and steps with infinite gradients are skipped."""
    model, penalty, inputs, targets = single()
    twin = copy.deepcopy(model)
    optimizer, reference = RotatedAdam(model, penalty, lr=0.1), RotatedAdam(twin, penalty, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for _ in range(3):
        optimizer.zero_grad()
        scaler.scale(CE(model(inputs), targets)).backward()
        scaler.step(optimizer)
        scaler.update()
        reference.zero_grad()
        CE(twin(inputs), targets).backward()
        reference.step()
    assert torch.equal(flat(model), flat(twin))
    optimizer.zero_grad()
    scaler.scale(CE(model(inputs), targets)).backward()
    model[0].weight.grad[0, 0] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(flat(model), flat(twin))
    assert counts(optimizer) == [3] * 4


def test_accumulated_and_clipped_gradients() -> None:
    model, penalty = consolidated("plain")
    oracle, start = dense(penalty, model), flat(model)
    optimizer, data = RotatedAdam(model, penalty, lr=0.1), task("plain", 5)
    for _ in range(3):
        gradients = [torch.zeros_like(p) for p in model.parameters()]
        optimizer.zero_grad()
        for inputs, targets in data:
            (CE(model(inputs), targets) / 2).backward()
            parts = torch.autograd.grad(CE(model(inputs), targets) / 2, list(model.parameters()))
            gradients = [g + part for g, part in zip(gradients, parts, strict=True)]
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        assert norm > 0.05
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        expected = advance(oracle, [0.05 / (norm + 1e-6) * g for g in gradients], 2.5 / 9)
        optimizer.step()
        assert_close(flat(model) - start, expected - start, 1e-7)


def test_penalty_in_another_precision() -> None:
    model, penalty = consolidated("plain", 2, separate_weight_and_bias=False)
    penalty.to(torch.float32)
    oracle, start = dense(penalty, model), flat(model)
    optimizer = RotatedAdam(model, penalty, lr=0.1)
    for step in range(4):
        expected = advance(oracle, draw(model, step), 2.5 / 10)
        optimizer.step()
    assert_close(flat(model) - start, expected - start, 1e-5)


# --------------------------------------------------------------------------- any operator


class Bare(nn.Module):
    """Nothing but parameters."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name, shape in shapes.items():
            value = torch.randn(shape, generator=generator, dtype=torch.float64)
            self.register_parameter(name, nn.Parameter(value))


def penalty_on(random: RandomOperator, model: nn.Module, strength: float) -> EKFACPenalty:
    """A penalty with a given operator, anchored where the model is."""
    penalty = EKFACPenalty(strength)
    anchor = {name: p.detach().clone() for name, p in model.named_parameters()}
    term = Term(random.operator(), anchor, 1.0)
    state = PenaltyState({}, penalty.mode, penalty.weighting, (term,), 1, 1, 1.0)
    penalty.load_state_dict(state.to_dict())
    return penalty


@settings(deadline=None, max_examples=60)
@given(
    random_operators(),
    st.floats(0, 1e6),
    st.floats(1e-3, 1.0),
    st.tuples(st.floats(0, 0.99), st.floats(0, 0.999)),
    st.sampled_from([1e-4, 1e-2, 1.0]),
    st.integers(0, 1000),
)
def test_any_operator(
    random: RandomOperator,
    strength: float,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    seed: int,
) -> None:
    """Of any layout: groups, transposed, joint, with or without bases, of one to four axes."""
    model = Bare(random.shapes(), seed)
    penalty = penalty_on(random, model, strength)
    at = coordinates(penalty, model)
    matrix = dense_operator(random.blocks(), random.shapes())
    torch.testing.assert_close(at.basis @ at.eigenvalues.diag() @ at.basis.T, matrix)
    torch.testing.assert_close(matrix, random.dense())
    move(model, seed, scale=1.0)
    oracle, start = dense(penalty, model, lr, betas=betas, eps=eps), flat(model)
    optimizer = RotatedAdam(model, penalty, lr, betas=betas, eps=eps)
    for step in range(2):
        expected = advance(oracle, draw(model, seed + step), strength)
        optimizer.step()
    assert_close(flat(model) - start, expected - start, 1e-9)
