"""Strategies that unpack minibatches, run the model or call the loss in their own way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from avalanche.benchmarks import benchmark_from_datasets
from avalanche.benchmarks.utils import AvalancheDataset, as_classification_dataset
from avalanche.training.supervised import Naive
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from rotate_ewc.integrations.avalanche import RotatedEWCPlugin
from tests.helpers.avalanche_training import CE, MultiHead, class_benchmark
from tests.helpers.exact_plugin import exact_plugin
from tests.helpers.exactness import assert_exact_diagonal
from tests.helpers.oracles import dense_ggn, parameter_shapes

CLASSES, SEEN = 4, 2


def seeded(*size: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(size))
    return torch.randn(*size, generator=generator, dtype=torch.float64)


def labels(*size: int) -> Tensor:
    return torch.randint(SEEN, size, generator=torch.Generator().manual_seed(sum(size)))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, CLASSES)).double()


class Masked(Naive):
    """Only the classes seen so far are outputs."""

    def forward(self) -> Tensor:
        outputs: Tensor = super().forward()
        return outputs[:, :SEEN]


class MaskedLoss(Naive):
    """The same, where the loss is called."""

    def criterion(self) -> Tensor:
        loss: Tensor = self._criterion(self.mb_output[:, :SEEN], self.mb_y)
        return loss


class KeywordLoss(Masked):
    def criterion(self) -> Tensor:
        loss: Tensor = self._criterion(input=self.mb_output, target=self.mb_y)
        return loss


class Tokens(Naive):
    """A prediction at each position of a sequence, all of them rows for the loss."""

    def criterion(self) -> Tensor:
        loss: Tensor = self._criterion(self.mb_output.flatten(0, 1), self.mb_y.flatten())
        return loss


class Named(Naive):
    """Minibatches are dictionaries, and the model has more than one input."""

    @property
    def mb_x(self) -> Tensor:
        assert self.mbatch is not None
        return self.mbatch["features"]

    @property
    def mb_y(self) -> Tensor:
        assert self.mbatch is not None
        return self.mbatch["labels"]

    def _unpack_minibatch(self) -> None:
        self.mbatch = {name: value.to(self.device) for name, value in self.mbatch.items()}

    def forward(self) -> Tensor:
        assert self.mbatch is not None
        outputs: Tensor = self.model(self.mb_x * self.mbatch["scale"])
        return outputs[:, :SEEN]


class Rows(Dataset[Mapping[str, Tensor]]):
    """A data set of dictionaries."""

    def __init__(self, **columns: Tensor) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns["labels"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[index] for name, column in self.columns.items()}


class Function(nn.Module):
    """What is differentiated, as a function of the inputs alone."""

    def __init__(self, model: nn.Module, function: Any) -> None:
        super().__init__()
        self.model = model
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.function(self.model, x)
        return outputs


def trained(kind: type[Naive], data: Any, plugin: RotatedEWCPlugin, **options: Any) -> Naive:
    model = net()
    strategy = kind(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.05), criterion=CE,
        train_mb_size=8, plugins=[plugin], evaluator=None, **options,
    )  # fmt: skip
    strategy.train(benchmark_from_datasets(train=[data]).train_stream[0])
    return strategy


def plain(x: Tensor, y: Tensor) -> Any:
    data = TensorDataset(x, y)
    data.targets = y.tolist()
    return as_classification_dataset(data) if y.ndim == 1 else AvalancheDataset([data])


def check_exact(strategy: Naive, plugin: RotatedEWCPlugin, function: Any, x: Any, y: Any) -> None:
    """The snapshot is that of a function of the model, by Jacobians of one example at a time."""
    names = [name for name, _ in strategy.model.named_parameters()]
    inside = [f"model.{name}" for name in names]
    dense = dense_ggn(Function(strategy.model, function), CE, inside, x, y)
    operator = plugin.penalty.terms[0].operator
    assert_exact_diagonal(operator, dense, parameter_shapes(strategy.model, names))


@pytest.mark.parametrize("kind", [Masked, MaskedLoss, KeywordLoss])
def test_masked_outputs(kind: type[Naive]) -> None:
    x, y = seeded(20, 6), labels(20)
    plugin = exact_plugin(mode="separate", update="loss", fisher_type="type2")
    strategy = trained(kind, plain(x, y), plugin)
    check_exact(strategy, plugin, lambda model, x: model(x)[:, :SEEN], x, y)


def test_masking_matters() -> None:
    """Guards against an oracle that does not mask."""
    x, y = seeded(20, 6), labels(20)
    plugin = exact_plugin(mode="separate", update="loss", fisher_type="type2")
    strategy = trained(Masked, plain(x, y), plugin)
    with pytest.raises(AssertionError):
        check_exact(strategy, plugin, lambda model, x: model(x), x, y)


@pytest.mark.parametrize("memory_budget", [2**30, 1])
def test_tokens_are_rows_of_the_loss(memory_budget: int) -> None:
    x, y = seeded(9, 3, 6), labels(9, 3)
    plugin = exact_plugin(
        mode="separate", update="loss", fisher_type="type2", memory_budget=memory_budget
    )
    strategy = trained(Tokens, plain(x, y), plugin)
    check_exact(strategy, plugin, lambda model, x: model(x).flatten(0, 1), x, y.flatten())


@pytest.mark.parametrize("memory_budget", [2**30, 1])
def test_minibatches_that_are_dictionaries(memory_budget: int) -> None:
    x, y, scale = seeded(20, 6), labels(20), seeded(20, 1).exp()
    data = AvalancheDataset([Rows(features=x, labels=y, scale=scale)])
    plugin = exact_plugin(
        mode="separate", update="loss", fisher_type="type2", memory_budget=memory_budget
    )
    strategy = trained(Named, data, plugin)
    check_exact(strategy, plugin, lambda model, x: model(x)[:, :SEEN], x * scale, y)


def test_task_labels_reach_an_own_forward() -> None:
    """The heads of other tasks get no gradient."""

    class Halved(Naive):
        def forward(self) -> Tensor:
            outputs: Tensor = super().forward()
            return outputs / 2

    plugin, model = exact_plugin(mode="separate", update="loss"), MultiHead()
    strategy = Halved(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.05), criterion=CE,
        train_mb_size=8, plugins=[plugin], evaluator=None,
    )  # fmt: skip
    for experience in class_benchmark(task_labels=True).train_stream:
        strategy.train(experience)
    heads = [f"classifier.classifiers.{t}.classifier.weight" for t in (0, 1)]
    for task, term in enumerate(plugin.penalty.terms):
        traces = {name: float(term.operator.block(name).trace) for name in heads[: task + 1]}
        assert [name for name, trace in traces.items() if trace > 0] == [heads[task]]


@pytest.mark.parametrize("kind", [Naive, Masked, Tokens])
def test_attributes_of_the_strategy_are_given_back(kind: type[Naive]) -> None:
    """Also one that its own forward makes."""

    class Marking(kind):  # type: ignore[misc, valid-type]
        def forward(self) -> Tensor:
            self.calls = getattr(self, "calls", 0) + 1
            outputs: Tensor = super().forward()
            return outputs

    class Watching(RotatedEWCPlugin):
        def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
            before, random_state = dict(vars(strategy)), torch.get_rng_state()
            super().before_training_exp(strategy, *args, **kwargs)
            assert torch.equal(torch.get_rng_state(), random_state)
            self.check(before, vars(strategy))

        def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
            before = dict(vars(strategy))
            super().after_training_exp(strategy, *args, **kwargs)
            self.check(before, vars(strategy))

        def check(self, before: dict[str, Any], after: dict[str, Any]) -> None:
            assert before.keys() == after.keys()
            assert [name for name in before if before[name] is not after[name]] == []

    token = kind is Tokens
    x, y = (seeded(9, 3, 6), labels(9, 3)) if token else (seeded(20, 6), labels(20))
    strategy = trained(Marking, plain(x, y), Watching())
    assert strategy.calls == -(-len(x) // 8)


class TwoLosses(Naive):
    def criterion(self) -> Tensor:
        loss: Tensor = self._criterion(self.mb_output, self.mb_y)
        return loss + self._criterion(2 * self.mb_output, self.mb_y)


class Scaled(Naive):
    def criterion(self) -> Tensor:
        return 2 * super().criterion()


class OwnLoss(Naive):
    def criterion(self) -> Tensor:
        return CE(self.mb_output, self.mb_y)


class Dictionary(Naive):
    def forward(self) -> dict[str, Tensor]:
        return {"logits": super().forward()}

    def criterion(self) -> Tensor:
        loss: Tensor = self._criterion(self.mb_output, self.mb_y)
        return loss


@pytest.mark.parametrize(
    ("kind", "criterion", "error", "message"),
    [
        (TwoLosses, CE, ValueError, r"TwoLosses.criterion\(\) calls self._criterion 2 times"),
        (Scaled, CE, ValueError, r"Scaled.criterion\(\) .* 1 times, and returns something else"),
        (OwnLoss, CE, ValueError, r"OwnLoss.criterion\(\) calls self._criterion 0 times"),
        (Dictionary, CE, TypeError, r"Dictionary gives its loss outputs of type dict"),
        (Naive, nn.L1Loss(), TypeError, r"L1Loss.* is not known"),
    ],
)
def test_what_cannot_be_consolidated_is_refused_before_training(
    kind: type[Naive], criterion: nn.Module, error: type[Exception], message: str
) -> None:
    model, plugin = net(), exact_plugin()
    strategy = kind(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.05), criterion=criterion,
        train_mb_size=8, plugins=[plugin], evaluator=None,
    )  # fmt: skip
    experience = benchmark_from_datasets(train=[plain(seeded(20, 6), labels(20))]).train_stream[0]
    with pytest.raises(error, match=message):
        strategy.train(experience)
    for name, parameter in net().named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name
    assert plugin.penalty.num_tasks == 0


def test_other_terms_are_added_before_the_backward_pass() -> None:
    """What the refusal of a criterion advises."""

    class Regularised(RotatedEWCPlugin):
        def before_backward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
            super().before_backward(strategy, *args, **kwargs)
            strategy.loss = strategy.loss + strategy.model[0].weight.square().sum()

    x, y = seeded(20, 6), labels(20)
    plugin = Regularised(
        1.0, "separate", update="loss", fisher_type="type2", temperature=1.0, damping=0.0
    )
    strategy = trained(Naive, plain(x, y), plugin)
    check_exact(strategy, plugin, lambda model, x: model(x), x, y)
