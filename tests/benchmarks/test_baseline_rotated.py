"""R-EWC, against loops over examples and gradients of the rotated parameters themselves."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.baselines import PublishedRotatedEWC
from benchmarks.baselines.plugin import LABELLING, make_generator, sampled_gradients
from benchmarks.baselines.rotated_published import is_rotated, trained_weight
from tests.benchmarks.helpers import DOUBLE, NETWORKS, TwoHeads, fake_strategy, make_network, move

networks = pytest.mark.parametrize("network", NETWORKS)


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
    number = len(list(model.parameters()))
    earlier: dict[str, Tensor] = {}
    for task in range(2):
        move(model)
        expected = model(inputs)
        plugin.after_training_exp(fake_strategy(model, inputs + task))
        torch.testing.assert_close(model(inputs), expected)
        for name, fisher in plugin.fisher.items():
            layer = model.get_submodule(name)
            U1, U2 = fisher.rotation.inputs, fisher.rotation.outputs
            for basis in (U1, U2):
                torch.testing.assert_close(basis.T @ basis, torch.eye(len(basis), dtype=DOUBLE))
            assert len(layer.parametrizations["weight"]) == 1
            rotated = torch.einsum("op,oi...,ij->pj...", U2, layer.weight, U1)
            torch.testing.assert_close(rotated, trained_weight(layer))
            assert name not in earlier or not torch.allclose(U1, earlier[name])
            earlier[name] = U1
    assert len(list(model.parameters())) == number


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
    before = {id(p): p.detach().clone() for p in model.parameters()}
    move(model)
    expected, gradients = torch.zeros((), dtype=DOUBLE), {}
    for name, fisher in plugin.fisher.items():
        layer = model.get_submodule(name)
        for parameter, diagonal in (
            (trained_weight(layer), fisher.weight),
            (layer.bias, fisher.bias),
        ):
            if diagonal is not None:
                change = (parameter - before[id(parameter)]).detach()
                expected += 3.0 / 2 * (diagonal * change**2).sum()
                gradients[id(parameter)] = 3.0 * diagonal * change
    found = plugin.penalty(model)
    torch.testing.assert_close(found, expected)
    parameters = list(model.parameters())
    for parameter, gradient in zip(parameters, torch.autograd.grad(found, parameters), strict=True):
        torch.testing.assert_close(gradient, gradients[id(parameter)])


def test_heads_keep_what_their_own_task_left() -> None:
    """A head that the last task did not use has the rotation and the Fisher matrix of its own."""
    torch.manual_seed(0)
    model, inputs = TwoHeads().double(), torch.randn(9, 3, dtype=DOUBLE)
    labels = (inputs[:, 0] > 0).long()
    plugin = PublishedRotatedEWC(1.0, samples=None, seed=0)
    plugin.after_training_exp(fake_strategy(model, inputs[labels == 0], labels[labels == 0]))
    assert set(plugin.fisher) == {"trunk", "heads.0"}
    assert not is_rotated(model.heads[1])
    old = dict(plugin.fisher)
    plugin.after_training_exp(fake_strategy(model, inputs[labels == 1], labels[labels == 1]))
    assert plugin.fisher["heads.0"] is old["heads.0"]
    assert plugin.fisher["trunk"] is not old["trunk"]
    assert is_rotated(model.heads[0])
    anchor = plugin.fisher["heads.0"].anchor
    torch.testing.assert_close(trained_weight(model.heads[0]).detach(), anchor)


def test_the_optimizer_keeps_each_parameter_and_forgets_the_old_coordinates() -> None:
    model, inputs = make_network("perceptron")
    weight = model[0].weight
    plugin = PublishedRotatedEWC(1.0, samples=None, seed=0)
    strategy = fake_strategy(model, inputs)
    for _ in range(2):
        F.cross_entropy(model(inputs), torch.arange(7) % 3).backward()
        strategy.optimizer.step()
        assert weight in strategy.optimizer.state
        plugin.after_training_exp(strategy)
        assert trained_weight(model[0]) is weight
        assert weight not in strategy.optimizer.state
        assert model[0].bias in strategy.optimizer.state


def test_steps_are_taken_in_rotated_coordinates() -> None:
    """The first step of Adam moves every coordinate of W' alike, and so not those of W."""
    _, model, inputs = consolidated("perceptron")
    weight = trained_weight(model[0])
    before = weight.detach().clone()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, eps=1e-20)
    F.cross_entropy(model(inputs), torch.arange(7) % 3).backward()
    optimizer.step()
    torch.testing.assert_close((weight - before).abs(), torch.full_like(weight, 0.01))
