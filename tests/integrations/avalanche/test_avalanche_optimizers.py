"""What becomes of the optimizer: while a task is trained, between tasks, when it is another one."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from avalanche.benchmarks import split_online_stream
from avalanche.models.utils import avalanche_forward, avalanche_model_adaptation
from avalanche.training.supervised import Naive
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from rotate_ewc import EKFACPenalty
from rotate_ewc.integrations.avalanche import RotatedEWCPlugin
from tests.helpers.avalanche_training import (
    CE,
    EPOCHS,
    TASKS,
    Incremental,
    MultiHead,
    class_benchmark,
    domain_benchmark,
    flat,
    net,
)

LR = 0.02


def adam(model: nn.Module) -> Optimizer:
    return Adam(model.parameters(), lr=LR)


def plugin_with(strength: float = 30.0, **options: Any) -> RotatedEWCPlugin:
    return RotatedEWCPlugin(strength, seed=5, **options)


def naive(
    model: nn.Module,
    optimizer: Optimizer,
    plugins: list[Any],
    epochs: int = EPOCHS,
    kind: type[Naive] = Naive,
) -> Naive:
    return kind(
        model=model, optimizer=optimizer, criterion=CE, train_mb_size=8, train_epochs=epochs,
        eval_mb_size=24, plugins=plugins, evaluator=None,
    )  # fmt: skip


def is_attached(optimizer: Optimizer) -> bool:
    found = bool(optimizer._optimizer_step_pre_hooks)
    assert found == bool(optimizer._optimizer_step_post_hooks) == ("step" in vars(optimizer))
    return found


def whole_run() -> Tensor:
    """Three tasks with one optimizer."""
    model = net(dropout=0.0)
    strategy = naive(model, adam(model), [plugin_with()])
    for experience in domain_benchmark(TASKS).train_stream:
        strategy.train(experience, shuffle=False)
    return flat(model)


# --------------------------------------------------------------------------- attached and detached


@pytest.mark.parametrize("update", ["rotated", "tangent", "gradient"])
def test_optimizer_steps_by_itself_between_tasks(update: str) -> None:
    model, plugin = net(dropout=0.0), plugin_with(update=update)
    optimizer = adam(model)
    strategy = naive(model, optimizer, [plugin])
    attached: list[bool] = []

    class Watch(RotatedEWCPlugin):
        def after_training_epoch(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
            attached.append(is_attached(strategy.optimizer))

    strategy.plugins.append(Watch(0.0, update="loss"))
    for experience in domain_benchmark(2).train_stream:
        strategy.train(experience, shuffle=False)
        assert not is_attached(optimizer)
        assert plugin.attachment is None
    assert attached == [True] * 2 * EPOCHS
    twin = copy.deepcopy(model)
    other = adam(twin)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for net_, stepped in ((model, optimizer), (twin, other)):
        for p in net_.parameters():
            p.grad = torch.ones_like(p)
        stepped.step()
    assert torch.equal(flat(model), flat(twin))


def test_online_streams() -> None:
    """Averages go on within a task, and start again with the next."""
    stream = split_online_stream(
        domain_benchmark(2).train_stream, experience_size=8, access_task_boundaries=True
    )
    model, plugin = net(dropout=0.0), plugin_with()
    optimizer = adam(model)
    strategy, taken = naive(model, optimizer, [plugin], 1), []
    for experience in stream:
        strategy.train(experience)
        steps = int(optimizer.state[model[0].weight].get("step", 0))
        taken.append((plugin.penalty.num_tasks, steps, is_attached(optimizer)))
    assert taken == [
        (0, 1, True), (0, 2, True), (1, 3, False), (1, 1, True), (1, 2, True), (2, 0, False),
    ]  # fmt: skip


def test_online_streams_are_the_same_as_by_hand() -> None:
    """Bit for bit: one penalty, attached all the time."""
    parts = list(split_online_stream(domain_benchmark(2).train_stream, experience_size=8))
    model, plugin = net(dropout=0.0), plugin_with()
    strategy = naive(model, adam(model), [plugin])
    expected, penalty = net(dropout=0.0), EKFACPenalty(30.0, seed=5)
    optimizer = adam(expected)
    penalty.attach(optimizer, expected)
    for number, part in enumerate(parts, start=1):
        strategy.train(part, shuffle=False)
        penalty.current_num_data = 24
        ((x, y),) = in_batches(part.dataset)
        for _ in range(EPOCHS):
            optimizer.zero_grad()
            CE(expected(x), y).backward()
            optimizer.step()
        if number % 3 == 0:
            whole = part.logging().origin_experience
            penalty.consolidate(expected, CE, in_batches(whole.dataset))
    assert plugin.penalty.num_tasks == 2
    assert torch.equal(flat(model), flat(expected))


def in_batches(data: Any) -> list[tuple[Tensor, Tensor]]:
    rows = [data[index] for index in range(len(data))]
    x, y = torch.stack([row[0] for row in rows]), torch.tensor([int(row[1]) for row in rows])
    return list(zip(x.split(8), y.split(8), strict=True))


def test_interrupted_task_goes_on() -> None:
    """The penalty is still attached, and taken over when the strategy trains again."""

    class Interrupting(Naive):
        broken = True

        def optimizer_step(self) -> None:
            if self.clock.train_exp_counter == 1 and self.broken:
                raise KeyboardInterrupt
            super().optimizer_step()

    model, plugin = net(dropout=0.0), plugin_with()
    optimizer = adam(model)
    strategy = naive(model, optimizer, [plugin], kind=Interrupting)
    experiences = domain_benchmark(TASKS).train_stream
    strategy.train(experiences[0], shuffle=False)
    with pytest.raises(KeyboardInterrupt):
        strategy.train(experiences[1], shuffle=False)
    assert is_attached(optimizer)
    strategy.broken = False
    for experience in experiences[1:]:
        strategy.train(experience, shuffle=False)
    assert torch.equal(flat(model), whole_run())
    assert not is_attached(optimizer)


# --------------------------------------------------------------------------- other optimizers


def test_optimizer_of_each_task() -> None:
    """Averages in an eigenbasis are those of a task, so that a new optimizer is as good."""
    model, plugin = net(dropout=0.0), plugin_with()
    strategy = naive(model, adam(model), [plugin])
    for experience in domain_benchmark(TASKS).train_stream:
        strategy.optimizer, strategy.optimized_param_id = adam(model), None
        strategy.train(experience, shuffle=False)
    assert torch.equal(flat(model), whole_run())


def test_optimizer_that_is_replaced_in_the_middle_of_a_task() -> None:
    """The old one is let go, the new one respects the penalty."""
    parts = list(split_online_stream(domain_benchmark(2).train_stream, experience_size=8))
    model, plugin = net(dropout=0.0), plugin_with(1e8)
    first, second = adam(model), SGD(model.parameters(), lr=0.05)
    strategy = naive(model, first, [plugin])
    for part in parts[:4]:
        strategy.train(part)
    assert is_attached(first)
    anchor = plugin.penalty.terms[0].anchor["3.weight"].clone()
    strategy.optimizer = second
    strategy.train(parts[4])
    assert not is_attached(first)
    assert not any("step" in state for state in first.state.values())
    assert is_attached(second)
    assert plugin.attachment is not None
    assert plugin.attachment.optimizer is second
    assert (model[3].weight - anchor).abs().max() < 1e-3
    strategy.train(parts[5])
    assert plugin.penalty.num_tasks == 2


def test_wrapped_optimizers() -> None:
    """As those of accelerate are."""

    class Accelerated(Optimizer):
        def __init__(self, optimizer: Optimizer) -> None:
            self.optimizer = optimizer

        def __getattr__(self, name: str) -> Any:
            return getattr(self.optimizer, name)

        def step(self, closure: Any = None) -> None:
            self.optimizer.step(closure)

        def zero_grad(self, set_to_none: bool = True) -> None:
            self.optimizer.zero_grad()

    model, plugin = net(dropout=0.0), plugin_with()
    inner = adam(model)
    strategy = naive(model, Accelerated(inner), [plugin])
    for experience in domain_benchmark(TASKS).train_stream:
        strategy.train(experience, shuffle=False)
    assert torch.equal(flat(model), whole_run())
    assert not is_attached(inner)


@pytest.mark.parametrize("update", ["rotated", "tangent", "gradient"])
def test_mixed_precision(update: str) -> None:
    """A strategy with a `GradScaler`, whose powers of two leave no trace."""

    class Scaled(Naive):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

        def backward(self) -> None:
            self.scaler.scale(self.loss).backward()

        def optimizer_step(self) -> None:
            self.scaler.step(self.optimizer)
            self.scaler.update()

    found = []
    for kind in (Naive, Scaled):
        model, plugin = net(dropout=0.0), plugin_with(update=update)
        strategy = naive(model, adam(model), [plugin], kind=kind)
        for experience in domain_benchmark(2).train_stream:
            strategy.train(experience, shuffle=False)
        found.append(flat(model))
    assert torch.equal(*found)


def test_resetting_the_state_changes_nothing() -> None:
    """What Avalanche can do before every experience has been done already."""
    model = net(dropout=0.0)
    strategy = naive(model, adam(model), [plugin_with()])
    for experience in domain_benchmark(TASKS).train_stream:
        strategy.train(experience, shuffle=False, reset_optimizer_state=True)
    assert torch.equal(flat(model), whole_run())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
@pytest.mark.parametrize("stop", [1, 4])
def test_copies_go_on_by_themselves(stop: int, copied: Callable[[Any], Any]) -> None:
    """Between tasks or in the middle of one; the original is not touched."""
    parts = list(split_online_stream(domain_benchmark(2).train_stream, experience_size=8))
    model, plugin = net(dropout=0.0), plugin_with()
    strategy = naive(model, adam(model), [plugin])
    for part in parts[:stop]:
        strategy.train(part, shuffle=False)
    again, kept, optimizer = copied((model, plugin, strategy.optimizer))
    assert kept.attachment is None
    assert not is_attached(optimizer)
    assert plugin.attachment is not None
    other = naive(again, optimizer, [kept])
    other.optimized_param_id = dict(again.named_parameters())
    for each in (other, strategy):
        for part in parts[stop:]:
            each.train(part, shuffle=False)
    assert torch.equal(flat(again), flat(model))
    assert kept.penalty.num_tasks == plugin.penalty.num_tasks == 2


# --------------------------------------------------------------------------- models that grow


def with_a_new_optimizer_for_each_task(model: nn.Module, stream: Any, strength: float) -> None:
    """By hand; nothing that one remembers is of any use after a consolidation."""
    penalty = EKFACPenalty(strength, seed=5)
    for experience in stream:
        torch.manual_seed(1)  # new parameters are drawn
        avalanche_model_adaptation(model, experience)
        optimizer = adam(model)
        penalty.attach(optimizer, model)
        data = experience.dataset
        labels = torch.tensor([int(data[index][2]) for index in range(len(data))]).split(8)
        batches = [((x, t), y) for (x, y), t in zip(in_batches(data), labels, strict=True)]
        penalty.current_num_data = len(data)
        model.train()
        for _ in range(EPOCHS):
            for inputs, y in batches:
                optimizer.zero_grad()
                CE(avalanche_forward(model, *inputs), y).backward()
                optimizer.step()
        penalty.consolidate(
            model, CE, batches, forward=lambda inputs: avalanche_forward(model, *inputs)
        )


@pytest.mark.parametrize("make", [Incremental, MultiHead])
@pytest.mark.parametrize("strength", [3.0, 1e8])
def test_models_that_grow(make: Callable[[], nn.Module], strength: float) -> None:
    """New parameters, and larger ones, take the place of the old in the optimizer."""
    stream = class_benchmark(task_labels=make is MultiHead).train_stream
    model, plugin = make(), plugin_with(strength)
    optimizer = adam(model)
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
    strategy = naive(model, adam(model), [plugin_with()])
    strategy.train(stream[0])
    old = model.classifier.classifiers["0"].classifier
    values, trunk = copy.deepcopy(old.state_dict()), model.features[0].weight.detach().clone()
    strategy.train(stream[1])
    assert torch.equal(old.weight, values["weight"])
    assert torch.equal(old.bias, values["bias"])
    assert not torch.equal(model.features[0].weight, trunk)


def test_old_rows_of_a_growing_classifier_are_held() -> None:
    """While the new ones learn."""
    stream, model = class_benchmark(task_labels=False).train_stream, Incremental()
    plugin = plugin_with(1e8)
    strategy = naive(model, adam(model), [plugin], epochs=4)
    strategy.train(stream[0])
    penalty, free = copy.deepcopy(plugin.penalty), copy.deepcopy(model)
    torch.manual_seed(1)
    strategy.train(stream[1], shuffle=False)
    torch.manual_seed(1)
    avalanche_model_adaptation(free, stream[1])
    start = free.classifier.classifier.weight.detach().clone()
    naive(free, adam(free), [], epochs=4).train(stream[1], shuffle=False)
    penalty.strength = 1.0
    assert penalty(model).item() < 1e-6 * penalty(free).item()
    moved = (model.classifier.classifier.weight.detach() - start).abs()
    assert moved.shape == (4, 8)
    assert moved[2:].max() > 0.05
