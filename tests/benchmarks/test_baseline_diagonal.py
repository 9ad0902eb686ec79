"""EWC with the exact diagonal Fisher matrix, against loops over examples and classes."""

import pytest
import torch
from torch import Tensor, nn

from benchmarks.baselines import DiagonalFisherEWC, plugin
from benchmarks.baselines.diagonal_fisher import exact_diagonal
from benchmarks.baselines.plugin import Examples
from tests.benchmarks.helpers import DOUBLE, NETWORKS, TwoHeads, fake_strategy, make_network, move

networks = pytest.mark.parametrize("network", NETWORKS)


def oracle(
    model: nn.Module, inputs: Tensor, task_labels: Tensor | None = None
) -> dict[str, Tensor]:
    """The definition: for each example and class, the squared gradient of the log probability."""
    parameters = dict(model.named_parameters())
    diagonal = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for n in range(len(inputs)):
        labels = () if task_labels is None else (task_labels[n : n + 1],)
        log_probabilities = model(inputs[n : n + 1], *labels).log_softmax(1)[0]
        for log_probability in log_probabilities:
            gradients = torch.autograd.grad(
                log_probability, list(parameters.values()), retain_graph=True, allow_unused=True
            )
            for name, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    diagonal[name] += log_probability.detach().exp() * gradient**2 / len(inputs)
    return diagonal


def estimate(
    model: nn.Module, inputs: Tensor, task_labels: Tensor | None = None
) -> dict[str, Tensor]:
    strategy = fake_strategy(model, inputs, task_labels)
    return exact_diagonal(model, Examples(strategy, samples=None, seed=0, task=0))


@networks
@pytest.mark.parametrize("batch_size", [7, 4])
def test_diagonal(network: str, batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over one batch and over two, the second of which is smaller."""
    monkeypatch.setattr(plugin, "BATCH_SIZE", batch_size)
    model, inputs = make_network(network, examples=7)
    torch.testing.assert_close(estimate(model, inputs), oracle(model, inputs))


@pytest.mark.parametrize("task_labels", [[0] * 6, [0, 1, 1, 0, 1, 1]])
def test_diagonal_of_heads(task_labels: list[int]) -> None:
    """A head has something from the examples of its task, and zeros if there are none."""
    torch.manual_seed(0)
    model = TwoHeads().double()
    inputs, labels = torch.randn(6, 3, dtype=DOUBLE), torch.tensor(task_labels)
    found = estimate(model, inputs, labels)
    torch.testing.assert_close(found, oracle(model, inputs, labels))
    assert (found["heads.1.weight"].sum() > 0) == (1 in task_labels)


@networks
def test_tasks_are_one_quadratic(network: str) -> None:
    """The gradient is that of the sum over tasks, and the value is less by a constant."""
    model, _ = make_network(network)
    method = DiagonalFisherEWC(3.0, samples=None, seed=0)
    tasks: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
    for task in range(3):
        _, inputs = make_network(network, examples=5 + task)
        method.after_training_exp(fake_strategy(model, inputs + task))
        anchor = {name: p.detach().clone() for name, p in model.named_parameters()}
        tasks.append((oracle(model, inputs + task), anchor))
        move(model)
    constants = []
    for _ in range(3):
        move(model)
        parameters = dict(model.named_parameters())
        expected = torch.zeros((), dtype=DOUBLE)
        for fisher, anchor in tasks:
            for name, p in parameters.items():
                expected = expected + 3.0 / 2 * (fisher[name] * (p - anchor[name]) ** 2).sum()
        found = method.penalty(model)
        constants.append((expected - found).item())
        torch.testing.assert_close(
            torch.autograd.grad(found, list(parameters.values())),
            torch.autograd.grad(expected, list(parameters.values())),
        )
    assert constants == pytest.approx([constants[0]] * 3)
    assert constants[0] > 0


def test_what_no_task_has_used_is_not_anchored() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2))
    method = DiagonalFisherEWC(1.0, samples=None, seed=0)
    inputs = torch.randn(5, 3)
    inputs[:, 1] = 0
    method.after_training_exp(fake_strategy(model, inputs))
    move(model)
    method.after_training_exp(fake_strategy(model, torch.randn(5, 3)))
    # The second input mattered to the second task alone, which is thus its anchor.
    weight = model[0].weight.detach()
    torch.testing.assert_close(method.anchor["0.weight"][:, 1], weight[:, 1])
    assert not torch.allclose(method.anchor["0.weight"][:, 0], weight[:, 0])
