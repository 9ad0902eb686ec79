"""Proximal updates, tangents and learning rates that diverge, in Avalanche's training loop."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from avalanche.training.supervised import Naive
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer, RMSprop

from rotate_ewc import EKFACPenalty, TangentPenalty
from rotate_ewc.integrations.avalanche import RotatedEWC, RotatedEWCPlugin
from tests.helpers.avalanche_training import (
    CE,
    EPOCHS,
    TASKS,
    MakeOptimizer,
    dataset,
    domain_benchmark,
    flat,
    net,
    sgd,
    trained,
)


def by_hand(
    every: int,
    step_size: float | None = None,
    make_optimizer: MakeOptimizer = sgd,
    schedule: float = 1.0,
) -> nn.Module:
    """The same in a plain loop, with what is left over applied at the end of each epoch."""
    model, penalty = net(dropout=0.0), EKFACPenalty(30.0, seed=5)
    optimizer = make_optimizer(model)
    for t in range(TASKS):
        x, y = dataset(t).tensors
        penalty.current_num_data = len(x)
        rate = 0.05
        optimizer.param_groups[0]["lr"] = rate
        for _ in range(EPOCHS):
            steps, waiting = 0, 0.0
            for rows in torch.arange(24).split(8):
                optimizer.zero_grad()
                CE(model(x[rows]), y[rows]).backward()
                optimizer.step()
                waiting += rate / (1.0 - 0.8) if step_size is None else step_size
                steps += 1
                if steps % every == 0:
                    penalty.proximal_step_(model, waiting)
                    waiting = 0.0
            if steps % every != 0:
                penalty.proximal_step_(model, waiting)
            rate *= schedule
            optimizer.param_groups[0]["lr"] = rate
        batches = [(x[rows], y[rows]) for rows in torch.arange(24).split(8)]
        penalty.consolidate(model, CE, batches)
    return model


@pytest.mark.parametrize("every", [1, 2, 3, 100])
def test_is_the_same_as_a_loop_written_by_hand(every: int) -> None:
    """Bit for bit; three steps an epoch are a multiple of 1 and 3, but not of 2 or 100."""
    plugin = RotatedEWCPlugin(30.0, update="proximal", every=every, seed=5)
    model = trained([plugin])
    assert torch.equal(flat(model), flat(by_hand(every)))
    assert plugin.penalty.num_tasks == TASKS
    assert (flat(model) - flat(trained([]))).abs().max() > 1e-3


@pytest.mark.parametrize("every", [1, 2])
def test_learning_rate_schedule(every: int) -> None:
    """Every step counts with the learning rate that it was made with."""

    class Restart(RotatedEWCPlugin):
        """The scheduler goes on over tasks; the loop by hand starts each at the same rate."""

        def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
            strategy.optimizer.param_groups[0]["lr"] = 0.05
            super().before_training_exp(strategy, *args, **kwargs)

    plugin = Restart(30.0, update="proximal", every=every, seed=5)
    model = trained([plugin], schedule=0.5)
    assert torch.equal(flat(model), flat(by_hand(every, schedule=0.5)))
    assert not torch.equal(flat(model), flat(by_hand(every)))


def tangent_by_hand(every: int, make_optimizer: MakeOptimizer, sizes: Callable[..., Any]) -> Tensor:
    """Tangent planes in a plain loop, with an implicit step for what is left over."""
    model, penalty = net(dropout=0.0), EKFACPenalty(30.0, seed=5)
    optimizer, tangent = make_optimizer(model), TangentPenalty(penalty)
    for t in range(TASKS):
        x, y = dataset(t).tensors
        penalty.current_num_data, parts = len(x), torch.arange(24).split(8)
        for _ in range(EPOCHS):
            waiting = 0
            for number, rows in enumerate(parts, start=1):
                optimizer.zero_grad()
                CE(model(x[rows]), y[rows]).backward()
                tangent.add_gradient_(model)
                optimizer.step()
                waiting += 1
                if waiting == every or number == len(parts):
                    tangent.refresh_(model, sizes(optimizer, model, waiting))
                    waiting = 0
        penalty.consolidate(model, CE, [(x[rows], y[rows]) for rows in parts])
    return flat(model)


@pytest.mark.parametrize("every", [1, 2, 3, 100])
@pytest.mark.parametrize("make_optimizer", ["sgd", "adam"])
def test_tangents_are_the_same_as_in_a_loop_written_by_hand(
    make_optimizer: str, every: int
) -> None:
    """With two epochs of three batches; proximal steps lead elsewhere."""
    if make_optimizer == "sgd":
        made, sizes = sgd, lambda optimizer, model, waiting: 0.05 * waiting / (1.0 - 0.8)
    else:
        made, sizes = adam, _adam_sizes
    plugin = RotatedEWCPlugin(30.0, update="tangent", every=every, seed=5)
    found = flat(trained([plugin], made))
    expected = tangent_by_hand(every, made, sizes)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    proximal = trained([RotatedEWCPlugin(30.0, update="proximal", every=every, seed=5)], made)
    for other in (flat(proximal), flat(trained([], made))):
        assert (found - other).abs().max() > 1e-4


def _adam_sizes(optimizer: Optimizer, model: nn.Module, waiting: int) -> dict[str, float]:
    named = model.named_parameters()
    return {name: typical_step(optimizer, p, 0.01 * waiting) for name, p in named}


def test_tangents_need_a_step_size_that_is_known() -> None:
    model, plugin = net(), RotatedEWCPlugin(3.0, update="tangent")
    strategy = Naive(
        model=model, optimizer=rmsprop(model), criterion=CE, train_mb_size=8, plugins=[plugin],
        evaluator=None,
    )  # fmt: skip
    with pytest.raises(ValueError, match="optimizer is RMSprop"):
        strategy.train(domain_benchmark(1).train_stream[0])
    trained([RotatedEWCPlugin(3.0, update="tangent", step_size=0.01)], rmsprop)


def test_step_size_that_is_given() -> None:
    plugin = RotatedEWCPlugin(30.0, update="proximal", every=2, step_size=0.7, seed=5)
    assert torch.equal(flat(trained([plugin])), flat(by_hand(2, step_size=0.7)))


def test_step_size_of_zero_protects_nothing() -> None:
    model = trained([RotatedEWCPlugin(30.0, update="proximal", step_size=0.0)])
    torch.testing.assert_close(flat(model), flat(trained([])))


def adam(model: nn.Module) -> Optimizer:
    return Adam(model.parameters(), lr=0.01)


def rmsprop(model: nn.Module) -> Optimizer:
    return RMSprop(model.parameters(), lr=0.01)


def groups(model: nn.Module) -> Optimizer:
    halves = [{"params": model[0].parameters()}, {"params": model[3].parameters(), "lr": 0.1}]
    return SGD(halves, lr=0.05)


def without_end(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), lr=0.05, momentum=1.0)


@pytest.mark.parametrize(
    ("make_optimizer", "message"),
    [
        (without_end, "momentum"),
        (rmsprop, r"optimizer is RMSprop, .* expected SGD, Adam or AdamW, or a step_size that"),
        (groups, r"groups have learning rates \[0.05, 0.1\]; expected one, or a step_size"),
    ],
)
def test_optimizers_without_one_step_size(make_optimizer: MakeOptimizer, message: str) -> None:
    """Refused before anything is learned."""
    model, plugin = net(), RotatedEWCPlugin(3.0, update="proximal")
    before = flat(model)
    strategy = Naive(
        model=model, optimizer=make_optimizer(model), criterion=CE, train_mb_size=8,
        plugins=[plugin], evaluator=None,
    )  # fmt: skip
    with pytest.raises(ValueError, match=message):
        strategy.train(domain_benchmark(1).train_stream[0])
    assert torch.equal(flat(model), before)
    assert plugin.penalty.num_tasks == 0


def typical_step(optimizer: Optimizer, parameter: Tensor, rate: float) -> float:
    """The learning rate over the geometric mean of the roots of Adam's mean squares."""
    state = optimizer.state[parameter]
    logarithms = [
        math.log(math.sqrt(value / (1 - 0.999 ** float(state["step"]))) + 1e-8)
        for value in state["exp_avg_sq"].flatten().tolist()
        if value > 0
    ]
    return rate * math.exp(-sum(logarithms) / len(logarithms))


@pytest.mark.parametrize("every", [1, 2])
def test_adam_steps_by_the_geometric_mean_of_its_scales(every: int) -> None:
    plugin = RotatedEWCPlugin(30.0, update="proximal", every=every, seed=5)
    model = trained([plugin], adam)
    expected, penalty = net(dropout=0.0), EKFACPenalty(30.0, seed=5)
    optimizer = adam(expected)
    for t in range(TASKS):
        x, y = dataset(t).tensors
        penalty.current_num_data = len(x)
        parts = torch.arange(24).split(8)
        for step, rows in enumerate(parts * EPOCHS, start=1):
            optimizer.zero_grad()
            CE(expected(x[rows]), y[rows]).backward()
            optimizer.step()
            in_epoch = (step - 1) % len(parts) + 1
            waiting = every if in_epoch % every == 0 else in_epoch % every if in_epoch == 3 else 0
            if waiting:
                named = expected.named_parameters()
                sizes = {n: typical_step(optimizer, p, 0.01 * waiting) for n, p in named}
                penalty.proximal_step_(expected, sizes)
        penalty.consolidate(expected, CE, [(x[rows], y[rows]) for rows in parts])
    torch.testing.assert_close(flat(model), flat(expected), rtol=1e-4, atol=1e-6)
    assert (flat(model) - flat(trained([], adam))).abs().max() > 1e-3


@pytest.mark.parametrize("make_optimizer", [adam, groups])
def test_any_optimizer_with_a_step_size(make_optimizer: MakeOptimizer) -> None:
    plugin = RotatedEWCPlugin(1e6, update="proximal", step_size=1.0)
    model = trained([plugin], make_optimizer)
    free = trained([], make_optimizer)
    assert plugin.penalty(model).item() < 1e-3 * plugin.penalty(free).item()


def test_enormous_strengths_are_stable() -> None:
    """Where the penalty in the loss is not."""
    model = trained([RotatedEWCPlugin(1e8, update="proximal")])
    assert bool(flat(model).isfinite().all())
    with pytest.warns(UserWarning, match="will diverge"), pytest.raises(ValueError, match="finite"):
        trained([RotatedEWCPlugin(1e8)])


@pytest.mark.parametrize(
    ("momentum", "nesterov", "dampening"),
    [
        (0.0, False, 0.0),
        (0.0, False, 0.25),
        (0.5, False, 0.0),
        (0.9, False, 0.0),
        (0.5, False, 0.25),
        (0.9, False, 0.25),
        (0.5, True, 0.0),
        (0.9, True, 0.0),
    ],
)
def test_step_size_is_how_far_a_gradient_of_one_leads(
    momentum: float, nesterov: bool, dampening: float
) -> None:
    """Measured: zeros first (which start the momentum), then one gradient, then zeros."""
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = SGD([parameter], lr=0.3, momentum=momentum, nesterov=nesterov, dampening=dampening)
    for step in range(400):
        parameter.grad = torch.full_like(parameter, float(step == 1))
        optimizer.step()
    seen: list[float] = []
    model, plugin = net(), RotatedEWCPlugin(1.0, update="proximal")
    plugin.penalty.proximal_step_ = lambda _, size: seen.append(size)
    optimizer = SGD(
        model.parameters(), lr=0.3, momentum=momentum, nesterov=nesterov, dampening=dampening
    )
    strategy = Naive(
        model=model, optimizer=optimizer, criterion=CE, train_mb_size=24, plugins=[plugin],
        evaluator=None,
    )  # fmt: skip
    for experience in domain_benchmark(2).train_stream:
        strategy.train(experience)
    assert seen == [pytest.approx(-parameter.item(), rel=1e-12)]


def plain_sgd(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), lr=0.05)


def test_warns_once_for_each_task() -> None:
    probe = RotatedEWCPlugin(1.0)
    trained([probe], plain_sgd)
    strength = 20 / (0.05 * probe.penalty.max_curvature)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plugin = RotatedEWCPlugin(strength)
        trained([plugin], plain_sgd)
    texts = [str(w.message) for w in caught if "will diverge" in str(w.message)]
    assert len(texts) == TASKS - 1
    for text in texts:
        assert "learning rate 0.05" in text
        assert f"strength {strength:g}" in text
        assert "update='proximal'" in text
    assert texts[0] != texts[1]  # each with the curvature of its time


@pytest.mark.parametrize(
    ("arguments", "make_optimizer"),
    [
        ({"ewc_lambda": 1.0}, plain_sgd),
        ({"ewc_lambda": 1e5}, adam),
        ({"ewc_lambda": 1e5, "update": "proximal"}, sgd),
        ({"ewc_lambda": 1e5, "update": "tangent"}, sgd),
    ],
)
def test_does_not_warn(arguments: dict[str, Any], make_optimizer: MakeOptimizer) -> None:
    """Of rates that are low enough, of adaptive optimizers, of proximal steps."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trained([RotatedEWCPlugin(**arguments)], make_optimizer)
    assert not [w for w in caught if "diverge" in str(w.message)]


def test_weighting_and_decay_are_handed_on() -> None:
    plugin = RotatedEWCPlugin(3.0, "separate", weighting="uniform", decay=0.5)
    trained([plugin])
    assert [term.weight for term in plugin.penalty.terms] == [0.25, 0.5, 1.0]


def test_strategy_takes_the_same_arguments() -> None:
    plugin, strategy = (inspect.signature(c).parameters for c in (RotatedEWCPlugin, RotatedEWC))
    missing = set(plugin) - set(strategy)
    assert missing <= {"progressbar"}
    for name in set(plugin) - missing:
        assert strategy[name].default == plugin[name].default, name


def test_strategy_is_the_plugin() -> None:
    options: dict[str, Any] = {
        "update": "proximal", "every": 4, "step_size": 0.7, "weighting": "uniform", "decay": 0.5,
    }  # fmt: skip
    reference = trained([RotatedEWCPlugin(30.0, seed=5, **options)])
    model = net(dropout=0.0)
    strategy = RotatedEWC(
        model=model, optimizer=sgd(model), ewc_lambda=30.0, seed=5, train_mb_size=8,
        train_epochs=EPOCHS, evaluator=None, **options,
    )  # fmt: skip
    for experience in domain_benchmark(TASKS).train_stream:
        strategy.train(experience, shuffle=False)
    assert torch.equal(flat(model), flat(reference))
    assert strategy.rotated_ewc.penalty.weighting == "uniform"
    assert strategy.rotated_ewc.penalty.decay == 0.5


@pytest.mark.parametrize(
    ("arguments", "message", "error"),
    [
        (
            {"update": "prox"},
            "update is 'prox'; expected one of 'penalty', 'tangent', 'pr",
            ValueError,
        ),
        ({"update": "proximal", "mode": "separate"}, "mode 'separate'; expected mode", ValueError),
        ({"update": "tangent", "mode": "separate"}, "mode 'separate'; expected mode", ValueError),
        ({"every": 2}, "every is 2 and .*'penalty'; expected them with .*'tangent' or", ValueError),
        ({"every": 0}, "every is 0; expected a positive integer", ValueError),
        ({"every": 2.0}, "every is 2.0; expected a positive integer", TypeError),
        ({"every": True}, "every is True; expected a positive integer", TypeError),
        ({"step_size": -0.1}, "step_size is -0.1", ValueError),
        ({"step_size": float("nan")}, "step_size is nan", ValueError),
        ({"step_size": "0.1"}, "step_size is '0.1'", TypeError),
        ({"weighting": "sizes"}, "weighting is 'sizes'", ValueError),
        ({"decay": 1.5}, "decay is 1.5", ValueError),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str, error: type[Exception]) -> None:
    with pytest.raises(error, match=message):
        RotatedEWCPlugin(**arguments)
    model = net()
    with pytest.raises(error, match=message):
        RotatedEWC(model=model, optimizer=sgd(model), evaluator=None, **arguments)
