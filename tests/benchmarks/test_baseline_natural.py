"""Natural continual learning, against dense matrices."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.baselines import NaturalContinualLearning
from benchmarks.baselines.kronecker_laplace import Factors, kronecker_factors
from benchmarks.baselines.natural_continual_learning import nearest_product
from benchmarks.baselines.plugin import LABELLING, Examples, make_generator
from tests.benchmarks.helpers import DOUBLE, NETWORKS, TwoHeads, fake_strategy, make_network, move


def positive(size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(size, 3 * size, dtype=DOUBLE, generator=generator)
    scales = torch.logspace(-1, 1, size, dtype=DOUBLE)
    return scales.diag() @ root @ root.T @ scales.diag() / size


def dense(factors: Factors) -> Tensor:
    """The matrix that acts on rows of weights written one after another."""
    return torch.kron(factors.gradients, factors.inputs)


def divergence(product: Factors, total: Tensor) -> Tensor:
    """Twice that of the normal distributions with these precisions, but for a constant."""
    precision = dense(product)
    return torch.logdet(precision) + torch.trace(torch.linalg.solve(precision, total))


def test_no_product_is_nearer_to_a_sum() -> None:
    first, second = (Factors(positive(4, seed), positive(3, seed + 1)) for seed in (0, 2))
    total = dense(first) + dense(second)
    found = nearest_product(first, second)
    leaves = [one.clone().requires_grad_() for one in (found.inputs, found.gradients)]
    slopes = torch.autograd.grad(divergence(Factors(*leaves), total), leaves)
    for leaf, slope in zip(leaves, slopes, strict=True):
        assert (slope.abs() * leaf.abs().max()).max() < 1e-8
    least = divergence(found, total)
    for other in (first, second, Factors(first.inputs + second.inputs, first.gradients)):
        assert divergence(other, total) > least + 0.01
    # A sum that is a product is found.
    same = nearest_product(first, Factors(first.inputs, 2 * first.gradients))
    torch.testing.assert_close(dense(same), 3 * dense(first), rtol=1e-9, atol=0)


def joint(layer: Any, of: Callable[[Tensor], Tensor]) -> Tensor:
    """Something of bias and weight, output by output."""
    parts = [of(layer.weight).flatten(1)]
    if layer.bias is not None:
        parts.insert(0, of(layer.bias).unsqueeze(1))
    return torch.cat(parts, 1).flatten()


def backward(model: nn.Module, inputs: Tensor, *task_labels: Tensor) -> None:
    model.zero_grad()
    model(inputs, *task_labels).square().sum().backward()


@pytest.mark.parametrize("network", NETWORKS)
def test_steps_are_those_of_dense_matrices(network: str) -> None:
    """Two tasks of different size, and steps on each and on a third."""
    model, _ = make_network(network)
    variance = 0.5
    plugin = NaturalContinualLearning(variance, samples=None, seed=0)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    anchor = {name: torch.zeros(()).double() for name in layers}
    product = {
        name: Factors(
            torch.eye(len(weight[0]) + bias).double(), torch.eye(len(weight)).double() * 2
        )
        for name, layer in layers.items()
        for weight, bias in [(layer.weight.flatten(1), layer.bias is not None)]
    }
    for task in range(3):
        size = 5 + task
        _, inputs = make_network(network, examples=size)
        strategy = fake_strategy(model, inputs + task)
        backward(model, inputs)
        before = {name: joint(layer, lambda p: p.grad.clone()) for name, layer in layers.items()}
        plugin.before_update(strategy)
        for name, layer in layers.items():
            precision = dense(product[name])
            moved = joint(layer, Tensor.detach) - anchor[name]
            step = size * torch.linalg.solve(precision, before[name]) + moved
            expected = step / (size * variance)
            found = joint(layer, lambda p: p.grad)
            torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
        plugin.after_training_exp(strategy)
        examples = Examples(strategy, samples=None, seed=0, task=task)
        fishers = kronecker_factors(model, examples, make_generator(0, task, LABELLING))
        for name, layer in layers.items():
            anchor[name] = joint(layer, Tensor.detach).clone()
            fisher = Factors(fishers[name].inputs, size * fishers[name].gradients)
            product[name] = nearest_product(product[name], fisher)
        move(model)
    assert plugin.tasks == 3


def test_heads_that_no_task_has_used_go_along_the_gradient() -> None:
    torch.manual_seed(0)
    model, inputs = TwoHeads().double(), torch.randn(6, 3, dtype=DOUBLE)
    plugin = NaturalContinualLearning(3.0)
    first, second = (torch.full((6,), task) for task in (0, 1))
    plugin.after_training_exp(fake_strategy(model, inputs, first))
    assert set(plugin.precision) == {"trunk", "heads.0"}
    move(model)
    backward(model, inputs, second)
    head = model.heads[1]
    before, moved = head.weight.grad.clone(), head.weight.detach() - plugin.anchor["heads.1"][:, 1:]
    trunk = model.trunk.weight.grad.clone()
    plugin.before_update(fake_strategy(model, inputs, second))
    torch.testing.assert_close(head.weight.grad, before + moved / (3 * 6))
    assert model.heads[0].weight.grad is None
    assert not torch.allclose(model.trunk.weight.grad, trunk)


def test_a_variance_of_zero_is_plain_training() -> None:
    model, inputs = make_network("perceptron")
    plugin = NaturalContinualLearning(0.0)
    for _ in range(2):
        backward(model, inputs)
        before = [p.grad.clone() for p in model.parameters()]
        plugin.before_update(fake_strategy(model, inputs))
        after = [p.grad for p in model.parameters()]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        plugin.after_training_exp(fake_strategy(model, inputs))
