"""What all published baselines have in common, and the networks that their tests use."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from benchmarks.avalanche_names import Naive, benchmark_from_datasets
from benchmarks.baselines import DiagonalFisherEWC, KroneckerLaplace, PublishedRotatedEWC
from benchmarks.baselines.examples import Examples
from benchmarks.baselines.plugin import QuadraticPlugin

ALL = [DiagonalFisherEWC, KroneckerLaplace, PublishedRotatedEWC]
BY_LAYER = [KroneckerLaplace, PublishedRotatedEWC]

all_plugins = pytest.mark.parametrize("make", ALL)
plugins_by_layer = pytest.mark.parametrize("make", BY_LAYER)


class Rows(Dataset[tuple[Tensor, ...]]):
    """Inputs, classes and, where there are any, task labels; like a data set of Avalanche's."""

    def __init__(self, inputs: Tensor, task_labels: Tensor | None = None) -> None:
        classes = torch.zeros(len(inputs), dtype=torch.long)
        self._columns = (inputs, classes) if task_labels is None else (inputs, classes, task_labels)

    def __len__(self) -> int:
        return len(self._columns[0])

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return tuple(column[index] for column in self._columns)

    def eval(self) -> "Rows":
        return self


def fake_strategy(
    model: nn.Module, inputs: Tensor, task_labels: Tensor | None = None
) -> SimpleNamespace:
    """The parts of a strategy that the plugins look at."""
    return SimpleNamespace(
        model=model,
        experience=SimpleNamespace(dataset=Rows(inputs, task_labels)),
        device=torch.device("cpu"),
        optimizer=torch.optim.Adam(model.parameters()),
        loss=torch.zeros(1),
    )


class TwoHeads(nn.Module):
    """A trunk and two heads; each example goes through the head of its task alone."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(3, 4)
        self.heads = nn.ModuleList([nn.Linear(4, 2), nn.Linear(4, 2)])

    def forward(self, inputs: Tensor, task_labels: Tensor) -> Tensor:
        hidden = torch.tanh(self.trunk(inputs))
        outputs = hidden.new_zeros(len(inputs), 2)
        for task, head in enumerate(self.heads):
            if (task_labels == task).any():
                outputs[task_labels == task] = head(hidden[task_labels == task])
        return outputs


class Tokens(nn.Module):
    """A linear layer on three tokens, called a second time on their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(3, 3)
        self.last = nn.Linear(3, 2, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.mix(torch.tanh(self.mix(inputs)).mean(1)))


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 3))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1, padding_mode="circular"),
        nn.ReLU(),
        nn.Conv2d(3, 2, (3, 1), padding="same", bias=False),
        nn.Flatten(),
        nn.Linear(18, 3),
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Sequence[int]]] = {
    "perceptron": (perceptron, (3,)),
    "convolutional": (convolutional, (2, 5, 6)),
    "tokens": (Tokens, (3, 3)),
    "layer": (lambda: nn.Linear(3, 4), (3,)),
}
networks = pytest.mark.parametrize("network", list(NETWORKS))


def make_network(network: str, examples: int = 7) -> tuple[nn.Module, Tensor]:
    """A network and inputs in float64."""
    make, shape = NETWORKS[network]
    torch.manual_seed(0)
    return make().double(), torch.randn(examples, *shape, dtype=torch.float64)


def move(model: nn.Module, size: float = 0.1) -> None:
    """Change all parameters a little."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn_like(parameter)


@all_plugins
@networks
def test_nothing_is_added_before_a_task_has_ended(
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
    weak, strong = plugin.penalty(model), make(2.0, samples=None, seed=0)
    strong.__dict__.update(plugin.__dict__ | {"strength": 6.0})
    assert weak > 0
    torch.testing.assert_close(strong.penalty(model), 3 * weak)


@all_plugins
def test_bad_settings_are_refused(make: type[QuadraticPlugin]) -> None:
    with pytest.raises(ValueError, match="strength is -1"):
        make(-1.0, samples=None, seed=0)
    with pytest.raises(ValueError, match="samples is 0"):
        make(1.0, samples=0, seed=0)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, inputs: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(inputs)))


@plugins_by_layer
@pytest.mark.parametrize(
    ("model", "name"),
    [
        (nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), "1.weight"),
        (nn.Sequential(nn.Unflatten(1, (4, 1, 1)), nn.Conv2d(4, 4, 1, groups=2)), "1.weight"),
        (Tied(), "first.weight"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    make: type[QuadraticPlugin], model: nn.Module, name: str
) -> None:
    plugin = make(1.0, samples=None, seed=0)
    with pytest.raises(ValueError, match=f"'{name}'"):
        plugin.after_training_exp(fake_strategy(model, torch.randn(5, 3)))


@plugins_by_layer
def test_a_model_without_trained_layers_is_refused(make: type[QuadraticPlugin]) -> None:
    model = perceptron().requires_grad_(False)
    model.append(nn.Linear(3, 3))
    plugin = make(1.0, samples=None, seed=0)
    plugin.after_training_exp(fake_strategy(model, torch.randn(5, 3)))
    plugin.penalty(model)  # what is not trained is nobody's concern
    model.requires_grad_(False)
    plugin = make(1.0, samples=None, seed=0)
    with pytest.raises(ValueError, match="no trained layer"):
        plugin.after_training_exp(fake_strategy(model, torch.randn(5, 3)))


@plugins_by_layer
def test_half_trained_layers_are_refused_by_name(make: type[QuadraticPlugin]) -> None:
    model = perceptron()
    model[2].weight.requires_grad = False
    with pytest.raises(ValueError, match="'2'"):
        make(1.0, samples=None, seed=0).after_training_exp(fake_strategy(model, torch.randn(5, 3)))


class Bypassed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return F.linear(self.first(inputs), self.second.weight, self.second.bias)


@all_plugins
def test_layers_that_are_used_without_being_called_are_refused_by_name(
    make: type[QuadraticPlugin],
) -> None:
    strategy = fake_strategy(Bypassed(), torch.randn(5, 3))
    with pytest.raises(ValueError, match=r"'second\.weight'"):
        make(1.0, samples=None, seed=0).after_training_exp(strategy)


@all_plugins
def test_a_protected_layer_that_is_gone_or_smaller_is_an_error(make: type[QuadraticPlugin]) -> None:
    model, inputs = make_network("perceptron")
    plugin = make(1.0, samples=None, seed=0)
    plugin.after_training_exp(fake_strategy(model, inputs))
    with pytest.raises(ValueError, match="does not have it any more"):
        plugin.penalty(nn.Sequential(nn.Linear(3, 4).double()))
    smaller = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    with pytest.raises(ValueError, match=r"'2.*expected at least \[3"):
        plugin.penalty(smaller)


@all_plugins
@networks
def test_the_model_is_left_as_it_was(make: type[QuadraticPlugin], network: str) -> None:
    model, inputs = make_network(network)
    model = nn.Sequential(model, nn.Dropout(0.5)).train()
    model[0].eval()
    strategy = fake_strategy(model, inputs)
    model(inputs).sum().backward()
    parameters = list(model.parameters())
    modes = [(module, module.training) for module in model.modules()]
    grads = [parameter.grad.clone() for parameter in parameters]
    outputs, random_state = model[0](inputs), torch.get_rng_state()
    with torch.no_grad():
        make(1.0, samples=4, seed=3).after_training_exp(strategy)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(module.training == mode for module, mode in modes)
    assert not any(module.training for module in model[0].modules())
    assert model[1].training
    assert all(module._forward_hooks == {} for module in model.modules())
    assert {id(p) for p in model.parameters()} == {id(p) for p in parameters}
    assert all(parameter.requires_grad for parameter in parameters)
    for parameter, grad in zip(parameters, grads, strict=True):
        assert torch.equal(parameter.grad, grad)
    torch.testing.assert_close(model[0](inputs), outputs)


@all_plugins
def test_a_model_that_has_diverged_is_an_error(make: type[QuadraticPlugin]) -> None:
    model, inputs = make_network("perceptron")
    with torch.no_grad():
        model[0].bias += torch.nan
    with pytest.raises(ValueError, match="not finite"):
        make(1.0, samples=None, seed=0).after_training_exp(fake_strategy(model, inputs))


def test_examples_are_drawn_anew_for_each_task_and_alike_for_each_seed() -> None:
    inputs = torch.arange(600.0).unsqueeze(1)
    strategy = fake_strategy(nn.Linear(1, 1), inputs)

    def drawn(samples: int | None, seed: int, task: int) -> list[float]:
        examples = Examples(strategy, samples=samples, seed=seed, task=task)
        values = torch.cat([batch.inputs for batch in examples]).squeeze(1).tolist()
        assert len(examples) == len(set(values)) == len(values)
        return values

    assert drawn(None, 0, 0) == drawn(600, 0, 0) == drawn(1000, 0, 0) == list(range(600))
    assert len(drawn(300, 0, 0)) == 300
    assert drawn(300, 0, 0) == drawn(300, 0, 0)
    assert drawn(300, 0, 0) != drawn(300, 1, 0)
    assert drawn(300, 0, 0) != drawn(300, 0, 1)


def make_naive(model: nn.Module, optimizer: torch.optim.Optimizer, *plugins: Any) -> Any:
    return Naive(
        model=model,
        optimizer=optimizer,
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=20,
        train_epochs=10,
        plugins=list(plugins),
        evaluator=None,
        eval_every=-1,
    )


def experiences(tasks: Sequence[tuple[Tensor, Tensor]], *, task_labels: bool = False) -> list[Any]:
    """Avalanche's experiences of inputs and classes, with task labels or without."""
    from avalanche.benchmarks import with_classes_timeline, with_task_labels
    from avalanche.benchmarks.utils import DataAttribute
    from avalanche.benchmarks.utils.classification_dataset import ClassificationDataset

    datasets = []
    for task, (inputs, classes) in enumerate(tasks):
        rows = torch.utils.data.TensorDataset(inputs, classes)
        attributes = [DataAttribute(classes.tolist(), "targets")]
        if task_labels:
            labels = [task] * len(inputs)
            attributes.append(DataAttribute(labels, "targets_task_labels", use_in_getitem=True))
        datasets.append(ClassificationDataset([rows], data_attributes=attributes))
    benchmark = with_classes_timeline(benchmark_from_datasets(train=datasets))
    if task_labels:
        benchmark = with_task_labels(benchmark)
    return list(benchmark.train_stream)


def permuted_tasks(seed: int) -> list[tuple[Tensor, Tensor]]:
    """Three tasks: four classes around centres, with the twelve inputs in an order of each task."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.arange(120) % 4
    centres = torch.randn(4, 12, generator=generator)
    inputs = centres[classes] + torch.randn(120, 12, generator=generator)
    orders = [torch.randperm(12, generator=generator) for _ in range(3)]
    return [(inputs[:, order], classes) for order in orders]


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_three_tasks_are_forgotten_less(optimizer: str) -> None:
    def loss_on_the_past(make: type[QuadraticPlugin] | None, strength: float = 0.0) -> float:
        """Mean cross-entropy of the first two tasks after the third."""
        losses = []
        for seed in range(2):
            torch.manual_seed(seed)
            tasks = permuted_tasks(seed)
            model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))
            made = (
                torch.optim.Adam(model.parameters(), lr=0.01)
                if optimizer == "adam"
                else torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
            )
            plugins = [] if make is None else [make(strength, samples=100, seed=seed)]
            strategy = make_naive(model, made, *plugins)
            for experience in experiences(tasks):
                strategy.train(experience)
            losses += [F.cross_entropy(model(x), y).item() for x, y in tasks[:2]]
            # The last task must still be learned.
            assert (model(tasks[2][0]).argmax(1) == tasks[2][1]).float().mean() > 0.8
        return sum(losses) / len(losses)

    naive = loss_on_the_past(None)
    assert loss_on_the_past(DiagonalFisherEWC, 10.0) < 0.7 * naive
    assert loss_on_the_past(KroneckerLaplace, 3.0) < 0.7 * naive
    assert loss_on_the_past(PublishedRotatedEWC, 10.0) < 0.7 * naive


class Growing(nn.Module):
    """A trunk with Avalanche's classifiers: one that grows, or one with a head for each task."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.trunk, self.head = nn.Linear(5, 8), head

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(torch.relu(self.trunk(inputs)))


def growing_tasks(*, new_classes: bool) -> list[tuple[Tensor, Tensor]]:
    """Three tasks of two classes each, the same two or new ones."""
    generator = torch.Generator().manual_seed(0)
    tasks = []
    for task in range(3):
        classes = torch.arange(60) % 2 + (2 * task if new_classes else 0)
        inputs = torch.randn(60, 5, generator=generator) + 2 * F.one_hot(classes % 5, 5)
        tasks.append((inputs, classes))
    return tasks


@all_plugins
def test_a_classifier_that_grows(make: type[QuadraticPlugin]) -> None:
    from avalanche.models import IncrementalClassifier

    torch.manual_seed(0)
    model = Growing(IncrementalClassifier(8))
    plugin = make(10.0, samples=None, seed=0)
    strategy = make_naive(model, torch.optim.Adam(model.parameters(), lr=0.01), plugin)
    for experience in experiences(growing_tasks(new_classes=True)):
        strategy.train(experience)
        with torch.no_grad():
            assert plugin.penalty(model).item() == pytest.approx(0, abs=1e-6) or (
                make is DiagonalFisherEWC
            )
        move(model)
        assert plugin.penalty(model) > 0.001
        assert_each_parameter_once(strategy)
    assert model.head.classifier.weight.shape == (6, 8)


@all_plugins
def test_a_head_for_each_task(make: type[QuadraticPlugin]) -> None:
    """The first task's head is protected by the first task alone, and does not move later."""
    from avalanche.models import MultiHeadClassifier, MultiTaskModule

    class WithHeads(MultiTaskModule):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.head = nn.Linear(5, 8), MultiHeadClassifier(8, masking=False)

        def forward_single_task(self, x: Tensor, task_label: int) -> Tensor:
            return self.head(torch.relu(self.trunk(x)), task_label)

    torch.manual_seed(0)
    model = WithHeads()
    plugin = make(10.0, samples=None, seed=0)
    strategy = make_naive(model, torch.optim.SGD(model.parameters(), lr=0.05), plugin)
    before = None
    for experience in experiences(growing_tasks(new_classes=False), task_labels=True):
        strategy.train(experience)
        first = model.head.classifiers["0"].classifier
        if before is not None:
            torch.testing.assert_close(first.weight, before, atol=1e-5, rtol=1e-5)
        before = first.weight.detach().clone()
        assert_each_parameter_once(strategy)
    assert set(model.head.classifiers) == {"0", "1", "2"}
    at_rest = plugin.penalty(model).item()
    move(first)
    assert plugin.penalty(model).item() > at_rest + 0.001


def assert_each_parameter_once(strategy: Any) -> None:
    """Every parameter of the model is one that the optimizer has, once."""
    optimized = [id(p) for group in strategy.optimizer.param_groups for p in group["params"]]
    for parameter in strategy.model.parameters():
        assert optimized.count(id(parameter)) == 1
