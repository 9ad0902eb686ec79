"""EWC with the exact diagonal Fisher matrix, against loops over examples and classes."""

import pytest
import torch
from torch import Tensor, nn

from benchmarks.baselines import DiagonalFisherEWC
from benchmarks.baselines.diagonal_fisher import exact_diagonal
from benchmarks.baselines.examples import Examples
from tests.benchmarks.test_benchmarks_baselines import (
    TwoHeads,
    fake_strategy,
    make_network,
    move,
    networks,
)


def oracle(
    model: nn.Module, inputs: Tensor, task_labels: Tensor | None = None
) -> dict[str, Tensor]:
    """The definition: for each example and class, the squared gradient of the log probability."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
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
@pytest.mark.parametrize("examples", [7, 300])
def test_diagonal(network: str, examples: int) -> None:
    """Over one batch and over two, the second of which is smaller."""
    model, inputs = make_network(network, examples)
    torch.testing.assert_close(estimate(model, inputs), oracle(model, inputs))


class Other(nn.Module):
    """Trained parameters of other kinds, besides layers of which only a part is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(2, 2, 1, groups=2)
        self.normal = nn.BatchNorm2d(2)
        self.scale = nn.Parameter(torch.rand(()))
        self.first, self.second = nn.Linear(8, 3), nn.Linear(3, 3)
        self.tied = nn.Linear(3, 3)
        self.tied.weight = self.second.weight
        self.first.weight.requires_grad = False

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(torch.relu(self.normal(self.grouped(inputs))).flatten(1))
        return self.scale * self.tied(torch.tanh(self.second(hidden)))


def test_diagonal_of_other_parameters() -> None:
    torch.manual_seed(0)
    model = Other().double()
    inputs = torch.randn(40, 2, 2, 2, dtype=torch.float64)
    model(inputs)  # so that the statistics of the batch norm are not those it starts with
    found = estimate(model, inputs)
    assert "first.weight" not in found
    torch.testing.assert_close(found, oracle(model.eval(), inputs))


@pytest.mark.parametrize("task_labels", [[0] * 6, [0, 1, 1, 0, 1, 1]])
@pytest.mark.parametrize("scaled", [False, True])
def test_diagonal_of_heads(task_labels: list[int], scaled: bool) -> None:
    """A head has something from the examples of its task, and zeros if there are none."""
    from avalanche.models import MultiTaskModule

    class Model(MultiTaskModule):
        def __init__(self) -> None:
            super().__init__()
            self.heads = TwoHeads()
            self.scale = nn.Parameter(torch.ones(3)) if scaled else 1.0

        def forward(self, inputs: Tensor, task_labels: Tensor) -> Tensor:
            if len(task_labels) == 1:  # without assignments to a part, for torch.func
                hidden = torch.tanh(self.heads.trunk(self.scale * inputs))
                return self.heads.heads[int(task_labels)](hidden)
            return self.heads(self.scale * inputs, task_labels)

    torch.manual_seed(0)
    model = Model().double()
    inputs, labels = torch.randn(6, 3, dtype=torch.float64), torch.tensor(task_labels)
    found = estimate(model, inputs, labels)
    torch.testing.assert_close(found, oracle(model, inputs, labels))
    assert (found["heads.heads.1.weight"].sum() > 0) == (1 in task_labels)


@networks
def test_tasks_are_one_quadratic(network: str) -> None:
    """The gradient is that of the sum over tasks, and the value is less by a constant."""
    model, _ = make_network(network)
    plugin = DiagonalFisherEWC(3.0, samples=None, seed=0)
    tasks: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
    for task in range(3):
        _, inputs = make_network(network, examples=5 + task)
        plugin.after_training_exp(fake_strategy(model, inputs + task))
        anchor = {name: p.detach().clone() for name, p in model.named_parameters()}
        tasks.append((oracle(model, inputs + task), anchor))
        move(model)

    def explicit() -> Tensor:
        terms = [
            fisher[name] * (parameter - anchor[name]) ** 2
            for fisher, anchor in tasks
            for name, parameter in model.named_parameters()
        ]
        return 3.0 / 2 * sum(term.sum() for term in terms)

    constants = []
    for _ in range(3):
        move(model)
        parameters = list(model.parameters())
        expected, found = explicit(), plugin.penalty(model)
        constants.append((expected - found).item())
        torch.testing.assert_close(
            torch.autograd.grad(found, parameters), torch.autograd.grad(expected, parameters)
        )
    assert constants == pytest.approx([constants[0]] * 3)
    assert constants[0] > 0


def test_what_no_task_has_used_is_not_anchored() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    plugin = DiagonalFisherEWC(1.0, samples=None, seed=0)
    inputs = torch.randn(5, 3)
    inputs[:, 1] = 0
    plugin.after_training_exp(fake_strategy(model, inputs))
    move(model)
    inputs = torch.randn(5, 3)
    plugin.after_training_exp(fake_strategy(model, inputs))
    # The second input mattered to the second task alone, which is thus its anchor.
    torch.testing.assert_close(plugin.anchor["weight"][:, 1], model.weight[:, 1].detach())
    assert not torch.allclose(plugin.anchor["weight"][:, 0], model.weight[:, 0])


def test_a_layer_that_has_grown() -> None:
    """What was there is protected as before, and the new outputs from then on."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2))
    plugin = DiagonalFisherEWC(1.0, samples=None, seed=0)
    inputs = torch.randn(5, 3)
    plugin.after_training_exp(fake_strategy(model, inputs))
    before, old = plugin.precision["0.weight"], model[0]
    model[0] = nn.Linear(3, 4)
    with torch.no_grad():
        model[0].weight[:2], model[0].bias[:2] = old.weight, old.bias
    assert plugin.penalty(model).item() == pytest.approx(0)
    plugin.after_training_exp(fake_strategy(model, inputs))
    expected = oracle(model, inputs)["0.weight"]
    expected[:2] += before
    torch.testing.assert_close(plugin.precision["0.weight"], expected)
    assert plugin.penalty(model).item() == pytest.approx(0, abs=1e-12)
