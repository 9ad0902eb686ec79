"""Kronecker-factored Laplace, against loops over examples, positions and dense matrices."""

import pytest
import torch
from torch import Tensor, nn

from benchmarks.baselines import KroneckerLaplace
from benchmarks.baselines.kronecker_laplace import Factors, kronecker_factors
from benchmarks.baselines.plugin import LABELLING, Examples, make_generator, sampled_gradients
from tests.benchmarks.helpers import DOUBLE, NETWORKS, TwoHeads, fake_strategy, make_network, move


def generator() -> torch.Generator:
    return make_generator(0, 0, LABELLING)


def estimate(
    model: nn.Module, inputs: Tensor, task_labels: Tensor | None = None
) -> dict[str, Factors]:
    examples = Examples(fake_strategy(model, inputs, task_labels), samples=None, seed=0, task=0)
    return kronecker_factors(model, examples, generator())


def with_one(vector: Tensor) -> Tensor:
    return torch.cat([vector.new_ones(1), vector])


@pytest.mark.parametrize("batch_size", [7, 4])
def test_factors_of_a_perceptron(batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients by hand; the second batch, if there is one, is smaller."""
    monkeypatch.setattr("benchmarks.baselines.plugin.BATCH_SIZE", batch_size)
    examples = 7
    model, inputs = make_network("perceptron", examples)
    draws = generator()
    A, G = [torch.zeros(())] * 2, [torch.zeros(())] * 2
    for n in range(examples):
        hidden = (model[0].weight @ inputs[n] + model[0].bias).detach()
        logits = (model[2].weight @ hidden.relu() + model[2].bias).detach()
        last = sampled_gradients(logits.unsqueeze(0), draws)[0]
        first = (model[2].weight.T @ last).detach() * (hidden > 0)
        for layer, (a, g) in enumerate([(inputs[n], first), (hidden.relu(), last)]):
            A[layer] = A[layer] + torch.outer(with_one(a), with_one(a)) / examples
            G[layer] = G[layer] + torch.outer(g, g) / examples
    found = estimate(model, inputs)
    assert set(found) == {"0", "2"}
    for layer, name in enumerate(["0", "2"]):
        torch.testing.assert_close(found[name].inputs, A[layer])
        torch.testing.assert_close(found[name].gradients, G[layer])


def test_factors_of_convolutions() -> None:
    """A is summed over positions, G averaged; the bias is coordinate 0, where there is one."""
    model, inputs = make_network("convolutional", examples=4)
    draws = generator()
    A = {"0": torch.zeros(19, 19).double(), "2": torch.zeros(9, 9).double()}
    G = {"0": torch.zeros(3, 3).double(), "2": torch.zeros(2, 2).double()}
    for example in inputs:
        padded = torch.nn.functional.pad(example, (1, 1, 1, 1))
        first = model[0](example[None]).detach().requires_grad_()
        rectified = first.relu()
        second = model[2](rectified)
        logits = model[3:](second)
        vector = sampled_gradients(logits, draws)
        gradients = torch.autograd.grad(logits, (first, second), vector)
        taller = torch.nn.functional.pad(rectified.detach(), (0, 0, 1, 1))[0]
        for row in range(3):
            for column in range(3):
                patch = padded[:, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3]
                a = with_one(patch.flatten())
                A["0"] += torch.outer(a, a) / 4
                a = taller[:, row : row + 3, column].flatten()
                A["2"] += torch.outer(a, a) / 4
                for name, gradient in zip(["0", "2"], gradients, strict=True):
                    g = gradient[0, :, row, column]
                    G[name] += torch.outer(g, g) / (4 * 9)
    found = estimate(model, inputs)
    for name in ["0", "2"]:
        torch.testing.assert_close(found[name].inputs, A[name])
        torch.testing.assert_close(found[name].gradients, G[name])


def test_heads() -> None:
    """A head gets its factors from the examples of its task, or none; dilution is counted once."""
    torch.manual_seed(0)
    model, inputs = TwoHeads().double(), torch.randn(9, 3, dtype=DOUBLE)
    labels = (inputs[:, 0] > 0).long()
    ours = labels == 1
    found = estimate(model, inputs, labels)
    vectors = sampled_gradients(model(inputs, labels), generator())[ours]
    hidden = torch.tanh(model.trunk(inputs[ours])).detach()
    a = torch.cat([torch.ones(len(hidden), 1), hidden], 1)
    torch.testing.assert_close(found["heads.1"].inputs, a.T @ a / 9)
    torch.testing.assert_close(found["heads.1"].gradients, vectors.T @ vectors / int(ours.sum()))

    plugin = KroneckerLaplace(1.0, samples=None, seed=0)
    plugin.after_training_exp(fake_strategy(model, inputs[~ours], labels[~ours]))
    assert set(plugin.factors) == {"trunk", "heads.0"}
    alone = plugin.factors["heads.0"]
    plugin.after_training_exp(fake_strategy(model, inputs[ours], labels[ours]))
    assert set(plugin.factors) == {"trunk", "heads.0", "heads.1"}
    assert plugin.factors["heads.0"] is alone


@pytest.mark.parametrize("network", NETWORKS)
def test_penalty_is_that_of_dense_matrices(network: str) -> None:
    """Both factors are summed over tasks, and the anchor is the last one's."""
    model, _ = make_network(network)
    plugin = KroneckerLaplace(3.0, samples=None, seed=0)
    each: list[dict[str, Factors]] = []
    for task in range(3):
        move(model)
        _, inputs = make_network(network, examples=5 + task)
        strategy = fake_strategy(model, inputs + task)
        plugin.after_training_exp(strategy)
        examples = Examples(strategy, samples=None, seed=0, task=task)
        each.append(kronecker_factors(model, examples, make_generator(0, task, LABELLING)))
    anchor = {name: p.detach().clone() for name, p in model.named_parameters()}
    move(model)
    expected = torch.zeros((), dtype=DOUBLE)
    for name in each[0]:
        layer = model.get_submodule(name)
        change = (layer.weight - anchor[f"{name}.weight"]).flatten(1)
        if layer.bias is not None:
            change = torch.cat([(layer.bias - anchor[f"{name}.bias"])[:, None], change], 1)
        gradients = sum(factors[name].gradients for factors in each)
        inputs = sum(factors[name].inputs for factors in each)
        flat = change.flatten()
        expected = expected + 3.0 / 2 * flat @ torch.kron(gradients, inputs) @ flat
    found = plugin.penalty(model)
    torch.testing.assert_close(found, expected)
    parameters = list(model.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(2 * found, parameters), torch.autograd.grad(2 * expected, parameters)
    )
