"""`RotatedAdam` inside Avalanche's training loop."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from avalanche.benchmarks import split_online_stream
from avalanche.models.utils import avalanche_forward, avalanche_model_adaptation
from avalanche.training.plugins import ReplayPlugin
from avalanche.training.supervised import Naive
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from rotate_ewc import EKFACPenalty, RotatedAdam
from rotate_ewc.integrations.avalanche import RotatedEWC, RotatedEWCPlugin
from tests.helpers.avalanche_training import (
    CE,
    EPOCHS,
    TASKS,
    Incremental,
    MultiHead,
    class_benchmark,
    dataset,
    domain_benchmark,
    flat,
    net,
    trained,
)

LR = 0.02


def rotated(model: nn.Module) -> RotatedAdam:
    return RotatedAdam(model, lr=LR)


def plugin_with(strength: float = 30.0, **options: Any) -> RotatedEWCPlugin:
    return RotatedEWCPlugin(strength, update="optimizer", seed=5, **options)


def naive(model: nn.Module, optimizer: Optimizer, plugins: list[Any], epochs: int = 2) -> Naive:
    return Naive(
        model=model, optimizer=optimizer, criterion=CE, train_mb_size=8, train_epochs=epochs,
        eval_mb_size=24, plugins=plugins, evaluator=None,
    )  # fmt: skip


def by_hand(strength: float = 30.0, schedule: float = 1.0) -> nn.Module:
    """A plain loop, without the penalty in the loss."""
    model, penalty = net(dropout=0.0), EKFACPenalty(strength, seed=5)
    optimizer = RotatedAdam(model, penalty, lr=LR)
    for t in range(TASKS):
        x, y = dataset(t).tensors
        penalty.current_num_data = len(x)
        parts = torch.arange(24).split(8)
        for epoch in range(EPOCHS):
            optimizer.param_groups[0]["lr"] = LR * schedule**epoch
            for rows in parts:
                optimizer.zero_grad()
                CE(model(x[rows]), y[rows]).backward()
                optimizer.step()
        penalty.consolidate(model, CE, [(x[rows], y[rows]) for rows in parts])
    return model


@pytest.mark.parametrize("strength", [0.0, 30.0, 1e8])
def test_is_the_same_as_a_loop_written_by_hand(strength: float) -> None:
    """Bit for bit."""
    plugin = plugin_with(strength)
    model = trained([plugin], rotated)
    assert torch.equal(flat(model), flat(by_hand(strength)))
    assert plugin.penalty.num_tasks == TASKS
    free = trained([], lambda model: Adam(model.parameters(), lr=LR))
    assert (flat(model) - flat(free)).abs().max() > 1e-3


def test_strategy_is_the_plugin() -> None:
    model = net(dropout=0.0)
    optimizer = rotated(model)
    strategy = RotatedEWC(
        model=model, optimizer=optimizer, ewc_lambda=30.0, update="optimizer", seed=5,
        train_mb_size=8, train_epochs=EPOCHS, evaluator=None,
    )  # fmt: skip
    for experience in domain_benchmark(TASKS).train_stream:
        strategy.train(experience, shuffle=False)
    assert torch.equal(flat(model), flat(by_hand()))
    assert optimizer.penalty is strategy.rotated_ewc.penalty


def test_learning_rate_schedule() -> None:
    """Avalanche's plugin for them starts every task at the same rate."""
    model = trained([plugin_with()], rotated, schedule=0.5)
    assert torch.equal(flat(model), flat(by_hand(schedule=0.5)))
    assert not torch.equal(flat(model), flat(by_hand()))


def test_optimizer_may_have_the_penalty_already() -> None:
    plugin = plugin_with()
    model = trained([plugin], lambda model: RotatedAdam(model, plugin.penalty, lr=LR))
    assert torch.equal(flat(model), flat(by_hand()))


@pytest.mark.parametrize("strength", [1e8, 1e30, 1e300])
def test_enormous_strengths_are_stable(strength: float) -> None:
    """And hold the model where it was."""
    plugin = plugin_with(strength)
    held, free = trained([plugin], rotated), trained([], rotated_without)
    assert bool(flat(held).isfinite().all())
    plugin.penalty.strength = 1.0
    assert plugin.penalty(held).item() < 1e-2 * plugin.penalty(free).item()


def rotated_without(model: nn.Module) -> Optimizer:
    """Nothing gives it a penalty."""
    return RotatedAdam(model, lr=LR)


# --------------------------------------------------------------------------- models that grow


def in_batches(experience: Any) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Inputs, targets and task labels, in the order of the data."""
    rows = [experience.dataset[index] for index in range(len(experience.dataset))]
    x = torch.stack([row[0] for row in rows])
    y, t = (torch.tensor([int(row[column]) for row in rows]) for column in (1, 2))
    return list(zip(x.split(8), y.split(8), t.split(8), strict=True))


def with_a_new_optimizer_for_each_task(model: nn.Module, stream: Any, strength: float) -> None:
    """By hand; nothing that one remembers is of any use after a consolidation."""
    penalty = EKFACPenalty(strength, seed=5)
    for experience in stream:
        torch.manual_seed(1)  # new parameters are drawn
        avalanche_model_adaptation(model, experience)
        optimizer = RotatedAdam(model, penalty, lr=LR)
        batches = in_batches(experience)
        penalty.current_num_data = len(experience.dataset)
        model.train()
        for _ in range(2):
            for x, y, t in batches:
                optimizer.zero_grad()
                CE(avalanche_forward(model, x, t), y).backward()
                optimizer.step()
        penalty.consolidate(
            model,
            CE,
            [((x, t), y) for x, y, t in batches],
            forward=lambda inputs: avalanche_forward(model, *inputs),
        )


@pytest.mark.parametrize("make", [Incremental, MultiHead])
@pytest.mark.parametrize("strength", [3.0, 1e8])
def test_models_that_grow(make: Callable[[], nn.Module], strength: float) -> None:
    """New parameters, and larger ones, take the place of the old in the optimizer."""
    stream = class_benchmark(task_labels=make is MultiHead).train_stream
    model, plugin = make(), plugin_with(strength)
    optimizer = rotated(model)
    strategy = naive(model, optimizer, [plugin])
    sizes = []
    for experience in stream:
        torch.manual_seed(1)
        strategy.train(experience, shuffle=False)
        sizes.append(len(flat(model)))
    assert sizes[1] > sizes[0]
    assert plugin.penalty.num_tasks == 2
    expected = make()
    with_a_new_optimizer_for_each_task(expected, stream, strength)
    assert torch.equal(flat(model), flat(expected))
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert known.issuperset(id(p) for p in model.parameters())


def test_heads_of_other_tasks_are_not_touched() -> None:
    """Bit for bit, in spite of the penalty on them."""
    stream, model = class_benchmark(task_labels=True).train_stream, MultiHead()
    strategy = naive(model, rotated(model), [plugin_with()])
    strategy.train(stream[0])
    old = model.classifier.classifiers["0"].classifier
    values, trunk = copy.deepcopy(old.state_dict()), model.features[0].weight.detach().clone()
    strategy.train(stream[1])
    assert torch.equal(old.weight, values["weight"])
    assert torch.equal(old.bias, values["bias"])
    assert not torch.equal(model.features[0].weight, trunk)
    new = model.classifier.classifiers["1"].classifier
    assert all(strategy.optimizer.state[p]["step"] > 0 for p in new.parameters())


def test_old_rows_of_a_growing_classifier_are_held() -> None:
    """While the new ones learn."""
    stream, model = class_benchmark(task_labels=False).train_stream, Incremental()
    plugin = plugin_with(1e8)
    strategy = naive(model, rotated(model), [plugin], epochs=4)
    strategy.train(stream[0])
    penalty, free = copy.deepcopy(plugin.penalty), copy.deepcopy(model)
    torch.manual_seed(1)
    strategy.train(stream[1], shuffle=False)
    torch.manual_seed(1)
    avalanche_model_adaptation(free, stream[1])
    start = free.classifier.classifier.weight.detach().clone()
    naive(free, rotated_without(free), [], epochs=4).train(stream[1], shuffle=False)
    penalty.strength = 1.0
    assert penalty(model).item() < 1e-6 * penalty(free).item()
    moved = (model.classifier.classifier.weight.detach() - start).abs()
    assert moved.shape == (4, 8)
    assert moved[2:].max() > 0.05


# --------------------------------------------------------------------------- the rest of Avalanche


def test_resetting_the_state_changes_nothing() -> None:
    """What Avalanche can do before every experience has been done already."""
    model = net(dropout=0.0)
    strategy = naive(model, rotated(model), [plugin_with()], EPOCHS)
    for experience in domain_benchmark(TASKS).train_stream:
        strategy.train(experience, shuffle=False, reset_optimizer_state=True)
    assert torch.equal(flat(model), flat(by_hand()))


def test_online_streams() -> None:
    """The averages go on within a task, and start anew with the next."""
    stream = split_online_stream(
        domain_benchmark(2).train_stream, experience_size=8, access_task_boundaries=True
    )
    model, plugin = net(dropout=0.0), plugin_with()
    optimizer = rotated(model)
    strategy, taken = naive(model, optimizer, [plugin], 1), []
    for experience in stream:
        strategy.train(experience)
        taken.append((plugin.penalty.num_tasks, int(optimizer.state[model[0].weight]["step"])))
    assert taken == [(0, 1), (0, 2), (1, 3), (1, 1), (1, 2), (2, 3)]


def test_with_replay_and_evaluation() -> None:
    model, plugin = net(), plugin_with()
    strategy = naive(model, rotated(model), [ReplayPlugin(mem_size=8), plugin])
    benchmark = domain_benchmark(2)
    for experience in benchmark.train_stream:
        strategy.train(experience, eval_streams=[benchmark.test_stream])
        strategy.eval(benchmark.test_stream)
    assert plugin.penalty.num_tasks == 2
    assert bool(flat(model).isfinite().all())


def test_checkpoint_continues_in_a_new_strategy() -> None:
    """From state dictionaries in a file, bit for bit."""
    experiences = list(domain_benchmark(TASKS).train_stream)
    model, plugin = net(dropout=0.0), plugin_with()
    optimizer = rotated(model)
    strategy = naive(model, optimizer, [plugin], EPOCHS)
    for experience in experiences[:-1]:
        strategy.train(experience, shuffle=False)
    buffer = io.BytesIO()
    torch.save([model.state_dict(), plugin.state_dict(), optimizer.state_dict()], buffer)
    buffer.seek(0)
    weights, state, averages = torch.load(buffer, weights_only=True)

    again, resumed = net(dropout=0.0), plugin_with()
    again.load_state_dict(weights)
    resumed.load_state_dict(state)
    other = rotated(again)
    other.load_state_dict(averages)
    naive(again, other, [resumed], EPOCHS).train(experiences[-1], shuffle=False)
    assert torch.equal(flat(again), flat(by_hand()))


def test_pickled_together() -> None:
    """As Avalanche's own checkpoints are."""
    experiences = list(domain_benchmark(TASKS).train_stream)
    model, plugin = net(dropout=0.0), plugin_with()
    optimizer = rotated(model)
    naive(model, optimizer, [plugin], EPOCHS).train(experiences[0], shuffle=False)
    again, kept, other = pickle.loads(pickle.dumps((model, plugin, optimizer)))
    assert other.penalty is kept.penalty
    assert other.model is again
    for experience in experiences[1:]:
        naive(again, other, [kept], EPOCHS).train(experience, shuffle=False)
    assert torch.equal(flat(again), flat(by_hand()))


# --------------------------------------------------------------------------- errors


def sgd(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), lr=0.05)


def adam(model: nn.Module) -> Optimizer:
    return Adam(model.parameters(), lr=LR)


def with_another_penalty(model: nn.Module) -> Optimizer:
    return RotatedAdam(model, EKFACPenalty(30.0), lr=LR)


WRONG = r"update is '{}' and the optimizer {}; expected update 'optimizer' with RotatedAdam"


@pytest.mark.parametrize(
    ("arguments", "make_optimizer", "message"),
    [
        ({}, rotated, WRONG.format("penalty", "RotatedAdam")),
        ({"mode": "separate"}, rotated, WRONG.format("penalty", "RotatedAdam")),
        ({"update": "proximal"}, rotated, "optimizer is RotatedAdam, .* expected SGD, Adam"),
        (
            {"update": "proximal", "step_size": 0.1},
            rotated,
            WRONG.format("proximal", "RotatedAdam"),
        ),
        ({"update": "optimizer"}, sgd, WRONG.format("optimizer", "SGD")),
        ({"update": "optimizer"}, adam, WRONG.format("optimizer", "Adam")),
        ({"update": "optimizer"}, with_another_penalty, "the optimizer has another penalty"),
    ],
)
def test_optimizers_that_do_not_fit(
    arguments: dict[str, Any], make_optimizer: Callable[[nn.Module], Optimizer], message: str
) -> None:
    """Refused before anything is learned."""
    model, plugin = net(), RotatedEWCPlugin(3.0, **arguments)
    optimizer, before = make_optimizer(model), flat(model)
    had = getattr(optimizer, "penalty", None)
    strategy = naive(model, optimizer, [plugin])
    with pytest.raises(ValueError, match=message):
        strategy.train(domain_benchmark(1).train_stream[0])
    assert torch.equal(flat(model), before)
    assert plugin.penalty.num_tasks == 0
    assert not any(optimizer.state.values())
    assert getattr(optimizer, "penalty", None) is had


def test_optimizer_of_another_plugin() -> None:
    model, first = net(), plugin_with()
    optimizer, stream = rotated(model), domain_benchmark(2).train_stream
    naive(model, optimizer, [first]).train(stream[0])
    before, second = flat(model), plugin_with()
    with pytest.raises(ValueError, match="the optimizer has another penalty already"):
        naive(model, optimizer, [second]).train(stream[1])
    assert torch.equal(flat(model), before)
    assert optimizer.penalty is first.penalty


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"update": "optimizer", "mode": "separate"},
            "update is 'optimizer' and mode 'separate'; expected mode 'merged'",
        ),
        (
            {"update": "optimizer", "every": 2},
            "every is 2 .* expected them with update 'tangent' or 'proximal'",
        ),
        ({"update": "optimizer", "step_size": 0.1}, "step_size 0.1, but update 'optimizer'"),
        ({"update": "adam"}, "update is 'adam'; expected one of .* 'optimizer'"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RotatedEWCPlugin(**arguments)
    model = net()
    with pytest.raises(ValueError, match=message):
        RotatedEWC(model=model, optimizer=rotated(model), evaluator=None, **arguments)
