"""What all published baselines have in common."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.baselines import (
    DiagonalFisherEWC,
    KroneckerLaplace,
    NaturalContinualLearning,
    PublishedRotatedEWC,
)
from benchmarks.baselines.plugin import (
    LABELLING,
    EstimatingPlugin,
    Examples,
    QuadraticPlugin,
    make_generator,
    sampled_gradients,
)
from tests.benchmarks.helpers import NETWORKS, fake_strategy, make_network, move, perceptron

PENALTIES = [DiagonalFisherEWC, KroneckerLaplace, PublishedRotatedEWC]
all_penalties = pytest.mark.parametrize("make", PENALTIES)
all_plugins = pytest.mark.parametrize("make", [*PENALTIES, NaturalContinualLearning])
networks = pytest.mark.parametrize("network", NETWORKS)


@all_penalties
@networks
def test_penalty_begins_with_the_second_task_and_is_linear_in_the_strength(
    make: type[QuadraticPlugin], network: str
) -> None:
    model, inputs = make_network(network)
    plugin = make(2.0, samples=None, seed=0)
    strategy = fake_strategy(model, inputs)
    plugin.before_backward(strategy)
    assert not strategy.loss.requires_grad
    plugin.after_training_exp(strategy)
    plugin.before_backward(strategy)
    assert strategy.loss.requires_grad
    assert strategy.loss.item() == pytest.approx(0, abs=1e-20)
    move(model)
    weak = plugin.penalty(model)
    plugin.strength = 6.0
    assert weak > 0
    torch.testing.assert_close(plugin.penalty(model), 3 * weak)


@all_plugins
def test_bad_settings_are_refused(make: type[EstimatingPlugin]) -> None:
    with pytest.raises(ValueError, match="strength: got -1"):
        make(-1.0, samples=None, seed=0)
    with pytest.raises(ValueError, match="samples: got 0"):
        make(1.0, samples=0, seed=0)


@all_plugins
@pytest.mark.parametrize(
    ("model", "name"),
    [
        (nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), "1.weight"),
        (nn.Sequential(nn.Unflatten(1, (4, 1, 1)), nn.Conv2d(4, 4, 1, groups=2)), "1.weight"),
        (nn.Sequential(perceptron(), nn.Linear(3, 3).requires_grad_(False)), "1.weight"),
        (nn.Sequential(*[nn.Linear(3, 3)] * 2), "0"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    make: type[EstimatingPlugin], model: nn.Module, name: str
) -> None:
    plugin = make(1.0, samples=None, seed=0)
    with pytest.raises(ValueError, match=f"'{name}'"):
        plugin.after_training_exp(fake_strategy(model, torch.randn(5, 3)))


@all_plugins
@networks
def test_the_model_is_left_as_it_was(make: type[EstimatingPlugin], network: str) -> None:
    model, inputs = make_network(network)
    model.train()
    strategy = fake_strategy(model, inputs)
    model(inputs).sum().backward()
    parameters = list(model.parameters())
    grads = [parameter.grad.clone() for parameter in parameters]
    outputs, random_state = model(inputs), torch.get_rng_state()
    with torch.no_grad():
        make(1.0, samples=4, seed=3).after_training_exp(strategy)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(module.training for module in model.modules())
    assert all(module._forward_hooks == {} for module in model.modules())
    assert {id(p) for p in model.parameters()} == {id(p) for p in parameters}
    for parameter, grad in zip(parameters, grads, strict=True):
        assert torch.equal(parameter.grad, grad)
    torch.testing.assert_close(model(inputs), outputs)


@all_plugins
def test_a_model_that_has_diverged_is_an_error(make: type[EstimatingPlugin]) -> None:
    model, inputs = make_network("perceptron")
    with torch.no_grad():
        model[0].bias += torch.nan
    with pytest.raises(ValueError, match="not finite"):
        make(1.0, samples=None, seed=0).after_training_exp(fake_strategy(model, inputs))


def test_examples_are_drawn_for_each_task_and_alike_for_each_seed() -> None:
    strategy = fake_strategy(nn.Linear(1, 1), torch.arange(600.0).unsqueeze(1))

    def drawn(samples: int | None, seed: int, task: int) -> list[float]:
        examples = Examples(strategy, samples=samples, seed=seed, task=task)
        values: list[float] = torch.cat([inputs for inputs, _ in examples]).squeeze(1).tolist()
        assert len(examples) == len(set(values)) == len(values)
        return values

    assert drawn(None, 0, 0) == drawn(600, 0, 0) == drawn(1000, 0, 0) == list(range(600))
    assert len(drawn(300, 0, 0)) == 300
    assert drawn(300, 0, 0) == drawn(300, 0, 0)
    assert drawn(300, 0, 0) != drawn(300, 1, 0)
    assert drawn(300, 0, 0) != drawn(300, 0, 1)


def test_labels_are_drawn_from_the_predictions() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0]).repeat(20_000, 1)
    vectors = sampled_gradients(logits, make_generator(0, 0, LABELLING))
    labels = (vectors - logits.softmax(1)).argmin(1)
    torch.testing.assert_close(vectors, logits.softmax(1) - torch.eye(3)[labels])
    frequencies = torch.bincount(labels) / len(labels)
    torch.testing.assert_close(frequencies, logits[0].softmax(0), atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("make", "strength"),
    [
        (DiagonalFisherEWC, 10.0),
        (KroneckerLaplace, 30.0),
        (PublishedRotatedEWC, 10.0),
        (NaturalContinualLearning, 1.0),
    ],
)
def test_tasks_are_forgotten_less(make: type[EstimatingPlugin], strength: float) -> None:
    """Two tasks whose inputs are in another order, by a plain loop with the plugin's callbacks."""
    generator = torch.Generator().manual_seed(0)
    classes = torch.arange(120) % 4
    inputs = torch.randn(4, 12, generator=generator)[classes]
    inputs += torch.randn(120, 12, generator=generator)
    tasks = [inputs[:, torch.randperm(12, generator=generator)] for _ in range(2)]

    def loss_on_the_past(plugin: Any) -> float:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))
        optimizer: torch.optim.Optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        if make is NaturalContinualLearning:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9)
        for task in tasks:
            strategy = fake_strategy(model, task)
            strategy.optimizer = optimizer
            for _ in range(80):
                optimizer.zero_grad()
                strategy.loss = F.cross_entropy(model(task), classes)
                if plugin is not None:
                    plugin.before_backward(strategy)
                strategy.loss.backward()
                if plugin is not None:
                    plugin.before_update(strategy)
                optimizer.step()
            if plugin is not None:
                plugin.after_training_exp(strategy)
        assert (model(tasks[1]).argmax(1) == classes).float().mean() > 0.8
        return F.cross_entropy(model(tasks[0]), classes).item()

    assert loss_on_the_past(make(strength, samples=100, seed=0)) < 0.7 * loss_on_the_past(None)
