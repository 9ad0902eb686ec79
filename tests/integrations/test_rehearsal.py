"""Mistakes that only consolidation would meet are refused before anything is trained."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from avalanche.training.supervised import Naive
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from transformers import TrainerCallback

from rotate_ewc import EKFACPenalty
from rotate_ewc.integrations.avalanche import RotatedEWCPlugin
from rotate_ewc.integrations.lightning import RotatedEWCCallback
from rotate_ewc.integrations.loaders import first_batch
from rotate_ewc.integrations.rehearsal import rehearse
from rotate_ewc.integrations.transformers import RotatedEWCCallback as OfTrainer
from tests.helpers import lightning_training
from tests.helpers.avalanche_training import domain_benchmark
from tests.helpers.hf_training import tiny_gpt2, trainer

pytestmark = pytest.mark.filterwarnings("ignore")
CE = nn.CrossEntropyLoss()


class Recurrent(nn.Module):
    """With a layer for which there is no rule."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.GRU(6, 4, batch_first=True), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.outer(self.inner(x[:, None])[0][:, 0])
        return found


def some_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs, targets)


PATTERNS: list[tuple[dict[str, Any], str]] = [
    ({"include": ["head.*"]}, "include pattern"),
    ({"exclude": ["head.*"]}, "exclude pattern"),
    ({"rank": {"head.*": 2}}, "rank pattern"),
    ({"unsupported": "diagonal", "diagonal": ["head.*"]}, "diagonal pattern"),
]
MISTAKES = [
    *((nn.Linear, options, CE, message) for options, message in PATTERNS),
    (Recurrent, {}, CE, "no rule|not supported|inner"),
    (nn.Linear, {}, nn.CrossEntropyLoss(reduction="none"), "reduction='none'"),
    (nn.Linear, {}, some_loss, "the distribution of labels behind it"),
]


def made(kind: type) -> nn.Module:
    torch.manual_seed(0)
    return kind() if kind is Recurrent else nn.Linear(6, 4)


class Module(lightning.LightningModule):
    def __init__(self, net: nn.Module, loss: Any) -> None:
        super().__init__()
        self.net, self.steps = net, 0

    def forward(self, x: Tensor) -> Any:
        return self.net(x)

    def training_step(self, batch: Any, index: int) -> Any:
        self.steps += 1
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader(**options: Any) -> DataLoader[Any]:
    x = torch.randn(12, 6, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, x[:, :4].argmax(dim=1)), batch_size=4, **options)


@pytest.mark.parametrize(("kind", "options", "loss", "message"), MISTAKES)
def test_lightning(kind: type, options: Any, loss: Any, message: str, tmp_path: Path) -> None:
    module = Module(made(kind), loss)
    run = lightning_training.trainer(tmp_path, RotatedEWCCallback(EKFACPenalty(**options), loss))
    before = list(run.callbacks)
    with pytest.raises((TypeError, ValueError), match=message):
        run.fit(module, loader())
    assert module.steps == 0
    assert run.callbacks == before
    assert not run.optimizers[0]._optimizer_step_pre_hooks


@pytest.mark.parametrize(("kind", "options", "loss", "message"), MISTAKES)
def test_avalanche(kind: type, options: Any, loss: Any, message: str) -> None:
    model = made(kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    strategy = Naive(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), criterion=loss,
        train_mb_size=8, plugins=[RotatedEWCPlugin(**options)], evaluator=None,
    )  # fmt: skip
    with pytest.raises((TypeError, ValueError), match=message):
        strategy.train(domain_benchmark(1).train_stream[0])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


class Steps(TrainerCallback):
    taken = 0

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.taken += 1


@pytest.mark.parametrize(("options", "message"), PATTERNS)
def test_trainer(options: Any, message: str, tmp_path: Path) -> None:
    steps = Steps()
    run = trainer(tmp_path, tiny_gpt2(), [OfTrainer(EKFACPenalty(**options)), steps], max_steps=1)
    with pytest.raises(ValueError, match=message):
        run.train()
    assert steps.taken == 0


def test_earlier_tasks_count() -> None:
    model, penalty = made(nn.Linear), EKFACPenalty()
    penalty.consolidate(model, CE, loader())
    with pytest.raises(ValueError, match="reduction 'sum', but earlier tasks had 'mean'"):
        rehearse(penalty, model, nn.CrossEntropyLoss(reduction="sum"), loader())
    with pytest.raises(ValueError, match="has shape"):
        rehearse(penalty, nn.Linear(5, 4), CE, loader())


class Loud(nn.Module):
    """Draws random numbers and counts its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(6, 4), nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        random.random()
        return self.dropout(self.linear(x + torch.randn(()))) - torch.randn(())


def test_nothing_is_changed() -> None:
    """Neither random states, nor the model, nor the penalty, nor the order of the data."""
    model = Loud()
    penalty = EKFACPenalty(unsupported="diagonal")
    generator = torch.Generator().manual_seed(3)
    data = loader(shuffle=True, generator=generator)
    before = torch.get_rng_state(), random.getstate(), generator.get_state()
    rehearse(penalty, model, CE, first_batch(data))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert torch.equal(before[2], generator.get_state())
    assert model.training
    assert float(model.calls) == 0.0
    assert all(parameter.grad is None for parameter in model.parameters())
    assert penalty.num_tasks == 0


class Stream(IterableDataset[Any]):
    def __init__(self, once: bool = False) -> None:
        self.once = iter(self._examples()) if once else None

    def _examples(self) -> Iterator[tuple[Tensor, int]]:
        for index in range(10):
            yield torch.full((6,), float(index)), index % 4

    def __iter__(self) -> Iterator[Any]:
        return self._examples() if self.once is None else self.once


class Buckets:
    """A sampler of batches that remembers how often it was asked."""

    asked = 0

    def __iter__(self) -> Iterator[list[int]]:
        self.asked += 1
        yield from ([5, 2], [1, 3, 4])

    def __len__(self) -> int:
        return 2


def test_first_batches() -> None:
    found = next(iter(first_batch(DataLoader(Stream(), batch_size=3))))
    assert found[0][:, 0].tolist() == [0.0, 1.0, 2.0]
    with pytest.raises(ValueError, match=r"one-shot stream \(Stream\)"):
        first_batch(DataLoader(Stream(once=True), batch_size=3))
    data, buckets = loader().dataset, Buckets()
    found = next(iter(first_batch(DataLoader(data, batch_sampler=buckets))))
    assert torch.equal(found[0], data.tensors[0][[5, 2]])
    assert buckets.asked == 0
    (found, _) = next(iter(first_batch(DataLoader(data, batch_size=None))))
    assert torch.equal(found, data.tensors[0][0])
    assert first_batch(object()) is None


def test_a_loss_with_counts_is_counted_first() -> None:
    """Two passes over the first batch, not one."""
    from rotate_ewc import SumOfLosses

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(6, 4), nn.GRU(6, 4)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"one": self.one(x), "two": self.two(x)[0]}

    batches = [(x, {"one": y, "two": y}) for x, y in loader()]
    with pytest.raises(ValueError, match=r"two\.weight"):
        rehearse(EKFACPenalty(), Heads(), SumOfLosses({"one": CE, "two": CE}), batches)
