"""R-EWC, against loops over examples and gradients of the rotated parameters themselves."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.baselines import PublishedRotatedEWC
from benchmarks.baselines.examples import LABELLING, make_generator, sampled_gradients
from benchmarks.baselines.rotation import is_rotated, trained_weight
from tests.benchmarks.test_benchmarks_baselines import (
    TwoHeads,
    assert_each_parameter_once,
    experiences,
    fake_strategy,
    make_naive,
    make_network,
    move,
    networks,
    permuted_tasks,
)


def consolidated(network: str, tasks: int = 1) -> tuple[PublishedRotatedEWC, nn.Module, Tensor]:
    """A plugin after some tasks, the model and the inputs of the last task."""
    model, inputs = make_network(network)
    plugin = PublishedRotatedEWC(3.0, samples=None, seed=0)
    for task in range(tasks):
        move(model)
        inputs = inputs + task
        plugin.after_training_exp(fake_strategy(model, inputs))
    return plugin, model, inputs


@networks
def test_the_function_stays_and_the_bases_are_orthonormal(network: str) -> None:
    """After the first task and after the second, whose rotation replaces that of the first."""
    model, inputs = make_network(network)
    plugin = PublishedRotatedEWC(3.0, samples=None, seed=0)
    plain = copy.deepcopy(model)
    rotations = []
    for task in range(3):
        move(model)
        expected = model(inputs)
        plugin.after_training_exp(fake_strategy(model, inputs + task))
        torch.testing.assert_close(model(inputs), expected)
        for name, fisher in plugin.fisher.items():
            layer = model.get_submodule(name)
            for basis in (fisher.rotation.outputs, fisher.rotation.inputs):
                identity = torch.eye(len(basis), dtype=basis.dtype)
                torch.testing.assert_close(basis.T @ basis, identity)
            assert len(layer.parametrizations["weight"]) == 1
            rotated = fisher.rotation.to_rotated(layer.weight)
            torch.testing.assert_close(rotated, trained_weight(layer))
            assert not torch.allclose(rotated, layer.weight)
        rotations.append(plugin.fisher)
        plugin.fisher = dict(plugin.fisher)
    assert len(list(model.parameters())) == len(list(plain.parameters()))
    for name, fisher in rotations[0].items():
        assert not torch.allclose(fisher.rotation.inputs, rotations[1][name].rotation.inputs)


def test_bases_diagonalise_the_moments() -> None:
    """Moments by hand: of channels over all pixels, of inputs and of gradients."""
    model, inputs = make_network("convolutional", examples=3)
    plugin = PublishedRotatedEWC(3.0, samples=None, seed=0)
    draws, A, G = make_generator(0, 0, LABELLING), torch.zeros(2, 2), torch.zeros(3, 3)
    for example in inputs:
        first = model[0](example[None]).detach().requires_grad_()
        logits = model[1:](first)
        (gradient,) = torch.autograd.grad(logits, first, sampled_gradients(logits, draws))
        for row in range(5):
            for column in range(6):
                A = A + torch.outer(example[:, row, column], example[:, row, column])
        for row in range(3):
            for column in range(3):
                g = gradient[0, :, row, column]
                G = G + torch.outer(g, g)
    plugin.after_training_exp(fake_strategy(model, inputs))
    rotation = plugin.fisher["0"].rotation
    for moment, basis in [(A, rotation.inputs), (G, rotation.outputs)]:
        diagonal = basis.T @ moment @ basis
        torch.testing.assert_close(diagonal, diagonal.diagonal().diag(), atol=1e-10, rtol=0)
        torch.testing.assert_close(diagonal.diagonal(), torch.linalg.eigvalsh(moment))


@networks
@pytest.mark.parametrize("tasks", [1, 2])
def test_fisher_is_that_of_the_rotated_parameters(network: str, tasks: int) -> None:
    """Squared gradients of single examples, with respect to what the optimizer has."""
    plugin, model, inputs = consolidated(network, tasks)
    draws = make_generator(0, tasks - 1, LABELLING)
    sums: dict[int, Any] = {}
    parameters = list(model.parameters())
    for n in range(len(inputs)):
        logits = model(inputs[n : n + 1])
        label = (sampled_gradients(logits, draws) - logits.softmax(1)).argmin(1)
        gradients = torch.autograd.grad(F.cross_entropy(logits, label), parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            sums[id(parameter)] = sums.get(id(parameter), 0) + gradient**2
    seen = 0
    for name, fisher in plugin.fisher.items():
        layer = model.get_submodule(name)
        expected = sums[id(trained_weight(layer))] / len(inputs)
        torch.testing.assert_close(fisher.weight, expected)
        seen += 1
        if fisher.bias is not None:
            torch.testing.assert_close(fisher.bias, sums[id(layer.bias)] / len(inputs))
            seen += 1
    assert seen == len(parameters)


@networks
def test_penalty_is_that_of_the_last_task_in_its_coordinates(network: str) -> None:
    plugin, model, _ = consolidated(network, tasks=3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    move(model)
    expected = torch.zeros((), dtype=torch.float64)
    gradients = {}
    for name, parameter in model.named_parameters():
        layer_name, kind = name.rpartition("bias")[:2] if name.endswith("bias") else (name, "")
        layer_name = layer_name.removesuffix("parametrizations.weight.original").rstrip(".")
        fisher = plugin.fisher[layer_name]
        diagonal = fisher.bias if kind else fisher.weight
        change = (parameter - before[name]).detach()
        expected += 3.0 / 2 * (diagonal * change**2).sum()
        gradients[name] = 3.0 * diagonal * change
    found = plugin.penalty(model)
    torch.testing.assert_close(found, expected)
    parameters = dict(model.named_parameters())
    for name, gradient in zip(
        parameters, torch.autograd.grad(found, list(parameters.values())), strict=True
    ):
        torch.testing.assert_close(gradient, gradients[name])


def test_heads_keep_what_their_own_task_left() -> None:
    """A head that the last task did not use has the rotation and the Fisher matrix of its own."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = TwoHeads()

        def forward(self, inputs: Tensor) -> Tensor:
            return self.heads(inputs, (inputs[:, 0] > 0).long())

    torch.manual_seed(0)
    model, inputs = Model().double(), torch.randn(9, 3, dtype=torch.float64)
    ours = inputs[:, 0] > 0
    plugin = PublishedRotatedEWC(1.0, samples=None, seed=0)
    plugin.after_training_exp(fake_strategy(model, inputs[~ours]))
    assert set(plugin.fisher) == {"heads.trunk", "heads.heads.0"}
    assert not is_rotated(model.heads.heads[1])
    old = dict(plugin.fisher)
    plugin.after_training_exp(fake_strategy(model, inputs[ours]))
    assert plugin.fisher["heads.heads.0"] is old["heads.heads.0"]
    assert plugin.fisher["heads.trunk"] is not old["heads.trunk"]
    head = model.heads.heads[0]
    assert is_rotated(head)
    torch.testing.assert_close(trained_weight(head).detach(), plugin.fisher["heads.heads.0"].anchor)


def test_a_layer_that_has_grown_is_rotated_again() -> None:
    """With identity for the new inputs and outputs; the penalty is that of the part it had."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2)).double()
    plugin = PublishedRotatedEWC(1.0, samples=None, seed=0)
    inputs = torch.randn(5, 3, dtype=torch.float64)
    plugin.after_training_exp(fake_strategy(model, inputs))
    old = model[0]
    move(model)
    expected = plugin.penalty(model).item()
    model[0] = nn.Linear(4, 3).double()
    with torch.no_grad():
        model[0].weight[:2, :3], model[0].bias[:2] = old.weight, old.bias
    assert plugin.penalty(model).item() == pytest.approx(expected)
    strategy = fake_strategy(model, inputs)
    larger = torch.randn(5, 4, dtype=torch.float64)
    outputs = model(larger)
    plugin.before_training_exp(strategy)
    assert is_rotated(model[0])
    torch.testing.assert_close(model(larger), outputs)
    assert plugin.penalty(model).item() == pytest.approx(expected)
    plugin.after_training_exp(fake_strategy(model, larger))
    torch.testing.assert_close(model(larger), outputs)
    assert plugin.fisher["0"].weight.shape == (3, 4)
    assert plugin.penalty(model).item() == 0


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD])
def test_avalanche_trains_the_rotated_weights(optimizer: Any) -> None:
    """The optimizer keeps each parameter once, forgets the old coordinates, and moves the new."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))
    weights = [model[0].weight, model[2].weight]
    plugin = PublishedRotatedEWC(1.0, samples=None, seed=0)
    options = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    strategy = make_naive(model, optimizer(model.parameters(), lr=0.01, **options), plugin)
    for experience in experiences(permuted_tasks(0)):
        before = [model[index].weight.detach().clone() for index in (0, 2)]
        strategy.train(experience)
        assert_each_parameter_once(strategy)
        groups = strategy.optimizer.param_groups
        assert sum(len(group["params"]) for group in groups) == 4
        for index, weight, old in zip((0, 2), weights, before, strict=True):
            assert trained_weight(model[index]) is weight
            assert weight not in strategy.optimizer.state
            assert model[index].bias in strategy.optimizer.state
            assert (model[index].weight - old).abs().max() > 0.01


def test_steps_are_taken_in_rotated_coordinates() -> None:
    """The first step of Adam moves every coordinate of W' alike, and so not those of W."""
    _, model, inputs = consolidated("perceptron")
    weight = trained_weight(model[0])
    before = weight.detach().clone()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, eps=1e-20)
    F.cross_entropy(model(inputs), torch.arange(7) % 3).backward()
    optimizer.step()
    torch.testing.assert_close((weight - before).abs(), torch.full_like(weight, 0.01))
