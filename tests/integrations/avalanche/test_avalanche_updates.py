"""The penalty in the strategy's optimizer, and learning rates that diverge, in Avalanche's loop."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import pytest
import torch
from avalanche.models.dynamic_optimizers import DynamicOptimizer
from avalanche.training.supervised import Naive
from torch import nn
from torch.optim import LBFGS, SGD, Adam, NAdam, Optimizer, Rprop

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
from tests.helpers.exact import exact_penalty
from tests.helpers.exact_plugin import exact_plugin

LR = 0.02


def adam(model: nn.Module) -> Optimizer:
    return Adam(model.parameters(), lr=LR)


def nadam(model: nn.Module) -> Optimizer:
    return NAdam(model.parameters(), lr=LR, weight_decay=0.1)


def rprop(model: nn.Module) -> Optimizer:
    return Rprop(model.parameters(), lr=LR)


def groups(model: nn.Module) -> Optimizer:
    halves = [{"params": model[0].parameters()}, {"params": model[3].parameters(), "lr": 0.1}]
    return SGD(halves, lr=0.05)


def by_hand(
    make_optimizer: MakeOptimizer,
    update: str = "rotated",
    every: int = 1,
    strength: float = 30.0,
    schedule: float = 1.0,
) -> nn.Module:
    """A plain loop, in which the penalty stays attached over all tasks."""
    model, penalty = net(dropout=0.0), exact_penalty(strength, seed=5)
    optimizer = make_optimizer(model)
    rates = [group["lr"] for group in optimizer.param_groups]
    with penalty.attach(optimizer, model, update, every) as handle:
        for t in range(TASKS):
            x, y = dataset(t).tensors
            penalty.current_num_data, parts = len(x), torch.arange(24).split(8)
            for epoch in range(EPOCHS):
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * schedule**epoch
                for rows in parts:
                    optimizer.zero_grad()
                    CE(model(x[rows]), y[rows]).backward()
                    optimizer.step()
                handle.flush()
            penalty.consolidate(model, CE, [(x[rows], y[rows]) for rows in parts])
    return model


@pytest.mark.parametrize(
    ("make_optimizer", "update", "every"),
    [
        *((sgd, "rotated", every) for every in (1, 3, 100)),
        *((made, "tangent", every) for made, every in ((sgd, 1), (adam, 2), (sgd, 100))),
        *((made, "rotated", 1) for made in (adam, nadam, groups)),
        *((made, "gradient", 1) for made in (sgd, adam, rprop)),
    ],
)
def test_is_the_same_as_a_loop_written_by_hand(
    make_optimizer: MakeOptimizer, update: str, every: int
) -> None:
    """Bit for bit; three steps an epoch are a multiple of 1 and 3, but not of 2 or 100."""
    strength = 3.0 if update == "gradient" else 30.0  # which would diverge
    plugin = exact_plugin(strength, update=update, every=every, seed=5)
    model = trained([plugin], make_optimizer)
    assert torch.equal(flat(model), flat(by_hand(make_optimizer, update, every, strength)))
    assert plugin.penalty.num_tasks == TASKS
    assert (flat(model) - flat(trained([], make_optimizer))).abs().max() > 1e-3


@pytest.mark.parametrize("strength", [0.0, 1e8])
def test_strengths(strength: float) -> None:
    model = trained([exact_plugin(strength, seed=5)], adam)
    assert torch.equal(flat(model), flat(by_hand(adam, strength=strength)))


@pytest.mark.parametrize(("make_optimizer", "every"), [(sgd, 1), (sgd, 2), (adam, 1)])
def test_learning_rate_schedule(make_optimizer: MakeOptimizer, every: int) -> None:
    """Avalanche's plugin for them starts every task at the same rate."""
    model = trained([exact_plugin(30.0, every=every, seed=5)], make_optimizer, schedule=0.5)
    expected = by_hand(make_optimizer, every=every, schedule=0.5)
    assert torch.equal(flat(model), flat(expected))
    assert not torch.equal(flat(model), flat(by_hand(make_optimizer, every=every)))


@pytest.mark.parametrize(
    ("make_optimizer", "strength"), [(sgd, 1e30), (adam, 1e8), (sgd, 1e300), (adam, 1e300)]
)
def test_enormous_strengths_are_stable(make_optimizer: MakeOptimizer, strength: float) -> None:
    """And hold the model where it was."""
    plugin = exact_plugin(strength, seed=5)
    held, free = trained([plugin], make_optimizer), trained([], make_optimizer)
    assert bool(flat(held).isfinite().all())
    plugin.penalty.strength = 1.0
    assert plugin.penalty(held).item() < 1e-2 * plugin.penalty(free).item()


# --------------------------------------------------------------------------- what is refused


def lbfgs(model: nn.Module) -> Optimizer:
    return LBFGS(model.parameters())


def without_end(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), lr=0.05, momentum=1.0)


def wrapped(model: nn.Module) -> Any:
    return DynamicOptimizer(sgd(model), model)


def attached(model: nn.Module) -> Optimizer:
    optimizer = sgd(model)
    exact_penalty().attach(optimizer, model)
    return optimizer


class OwnOptimizer(Naive):
    """Leaves the optimizer alone, whatever it is."""

    def make_optimizer(self, *args: Any, **kwargs: Any) -> None:
        pass


def naive(make_optimizer: MakeOptimizer, plugin: Any, kind: type[Naive] = Naive) -> Naive:
    model = net(dropout=0.0)
    return kind(
        model=model, optimizer=make_optimizer(model), criterion=CE, train_mb_size=8,
        train_epochs=EPOCHS, plugins=[plugin], evaluator=None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "make_optimizer", "error", "message"),
    [
        ({}, lbfgs, ValueError, r"optimizer is LBFGS, .*Avalanche plugin: update='loss'"),
        ({}, rprop, ValueError, r"optimizer is Rprop, .* or use update='gradient'"),
        ({"update": "tangent"}, rprop, ValueError, "optimizer is Rprop"),
        ({"every": 2}, adam, ValueError, "every is 2, but update='rotated' .*update='tangent'"),
        ({"update": "gradient", "every": 2}, sgd, ValueError, "every is 2, but update='gradient'"),
        ({}, attached, ValueError, "already has a penalty attached"),
        ({}, wrapped, TypeError, r"optimizer is DynamicOptimizer; expected a torch\.optim"),
    ],
)
def test_optimizers_that_do_not_fit(
    options: dict[str, Any],
    make_optimizer: MakeOptimizer,
    error: type[Exception],
    message: str,
) -> None:
    """Refused before anything is learned, with a remedy."""
    plugin = exact_plugin(3.0, **options)
    strategy = naive(make_optimizer, plugin, OwnOptimizer)
    before, hooks = (
        flat(strategy.model),
        getattr(strategy.optimizer, "_optimizer_step_pre_hooks", {}),
    )
    count = len(hooks)
    with pytest.raises(error, match=message):
        strategy.train(domain_benchmark(1).train_stream[0])
    assert torch.equal(flat(strategy.model), before)
    assert plugin.penalty.num_tasks == 0
    assert len(hooks) == count
    assert plugin.attachment is None


@pytest.mark.parametrize(
    ("options", "make_optimizer"),
    [
        ({"update": "gradient"}, rprop),
        ({"update": "tangent", "every": 2}, adam),
        ({"update": "loss"}, wrapped),
        ({"update": "loss"}, attached),
        ({"update": "loss", "mode": "separate"}, sgd),
    ],
)
def test_remedies(options: dict[str, Any], make_optimizer: MakeOptimizer) -> None:
    plugin = exact_plugin(3.0, **options)
    strategy = naive(make_optimizer, plugin, OwnOptimizer)
    free = naive(make_optimizer, exact_plugin(0.0, **options), OwnOptimizer)
    for experience in domain_benchmark(2).train_stream:
        for each in (strategy, free):
            each.train(experience, shuffle=False)
    assert plugin.penalty.num_tasks == 2
    assert (flat(strategy.model) - flat(free.model)).abs().max() > 1e-4


def test_optimizers_whose_gradients_act_for_ever() -> None:
    """Once there is a penalty: before, their steps are not looked at."""
    plugin = exact_plugin(3.0)
    strategy = naive(without_end, plugin)
    first, second = domain_benchmark(2).train_stream
    strategy.train(first)
    before = flat(strategy.model)
    with pytest.raises(ValueError, match="momentum 1, so that a gradient acts forever"):
        strategy.train(second)
    assert torch.equal(flat(strategy.model), before)


@pytest.mark.parametrize(
    ("arguments", "message", "error"),
    [
        ({"update": "proximal"}, "update is 'proximal'; expected one of 'rotated', ", ValueError),
        *(
            ({"update": update, "mode": "separate"}, "mode='merged', or update='loss'", ValueError)
            for update in ("rotated", "tangent", "gradient")
        ),
        ({"every": 2, "update": "loss"}, "every is 2, but with update='loss'", ValueError),
        ({"every": 0}, "every is 0; expected a positive integer", ValueError),
        ({"every": 2.0}, "every is 2.0; expected a positive integer", TypeError),
        ({"every": True}, "every is True; expected a positive integer", TypeError),
        ({"step_size": 0.1}, "step_size", TypeError),
        ({"weighting": "sizes"}, "weighting is 'sizes'", ValueError),
        ({"decay": 1.5}, "decay is 1.5", ValueError),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str, error: type[Exception]) -> None:
    with pytest.raises(error, match=message):
        exact_plugin(**arguments)
    model = net()
    with pytest.raises(error, match=message):
        RotatedEWC(model=model, optimizer=sgd(model), evaluator=None, **arguments)


# --------------------------------------------------------------------------- divergence


def plain_sgd(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), lr=0.05)


@pytest.mark.parametrize("update", ["loss", "gradient"])
def test_warns_once_for_each_task(update: str) -> None:
    probe = exact_plugin(1.0, update=update)
    trained([probe], plain_sgd)
    strength = 20 / (0.05 * probe.penalty.max_curvature)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plugin = exact_plugin(strength, update=update)
        trained([plugin], plain_sgd)
    texts = [str(w.message) for w in caught if "will diverge" in str(w.message)]
    assert len(texts) == TASKS - 1
    for text in texts:
        assert "learning rate 0.05" in text
        assert f"strength {strength:g}" in text
        assert "update='rotated'" in text
    assert texts[0] != texts[1]  # each with the curvature of its time


def test_advice_of_the_warning_can_be_followed() -> None:
    model = trained([exact_plugin(1e8, update="rotated")], plain_sgd)
    assert bool(flat(model).isfinite().all())
    with pytest.warns(UserWarning, match="will diverge"), pytest.raises(ValueError, match="finite"):
        trained([exact_plugin(1e8, update="loss")], plain_sgd)


@pytest.mark.parametrize(
    ("arguments", "make_optimizer"),
    [
        ({"ewc_lambda": 1.0, "update": "loss"}, plain_sgd),
        ({"ewc_lambda": 1e5, "update": "loss"}, adam),
        ({"ewc_lambda": 1e5}, sgd),
        ({"ewc_lambda": 1e5, "update": "tangent"}, sgd),
    ],
)
def test_does_not_warn(arguments: dict[str, Any], make_optimizer: MakeOptimizer) -> None:
    """Of rates that are low enough, of adaptive optimizers, of updates that are stable."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trained([exact_plugin(**arguments)], make_optimizer)
    assert not [w for w in caught if "diverge" in str(w.message)]


# --------------------------------------------------------------------------- the ready strategy


def test_weighting_and_decay_are_handed_on() -> None:
    plugin = exact_plugin(3.0, "separate", update="loss", weighting="uniform", decay=0.5)
    trained([plugin])
    assert [term.weight for term in plugin.penalty.terms] == [0.25, 0.5, 1.0]


def test_strategy_takes_the_same_arguments() -> None:
    plugin, strategy = (inspect.signature(c).parameters for c in (RotatedEWCPlugin, RotatedEWC))
    missing = set(plugin) - set(strategy)
    assert missing <= {"progressbar"}
    for name in set(plugin) - missing:
        assert strategy[name].default == plugin[name].default, name


@pytest.mark.parametrize(
    ("make_optimizer", "options"),
    [(adam, {}), (sgd, {"update": "tangent", "every": 4, "weighting": "uniform", "decay": 0.5})],
)
def test_strategy_is_the_plugin(make_optimizer: MakeOptimizer, options: dict[str, Any]) -> None:
    reference = trained([exact_plugin(30.0, seed=5, **options)], make_optimizer)
    model = net(dropout=0.0)
    strategy = RotatedEWC(
        model=model, optimizer=make_optimizer(model), ewc_lambda=30.0, temperature=1.0,
        damping=0.0, seed=5, train_mb_size=8, train_epochs=EPOCHS, evaluator=None, **options,
    )  # fmt: skip
    for experience in domain_benchmark(TASKS).train_stream:
        strategy.train(experience, shuffle=False)
    assert torch.equal(flat(model), flat(reference))
    assert strategy.rotated_ewc.penalty.decay == options.get("decay", 1.0)
