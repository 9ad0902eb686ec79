"""What the `training_step` of a module may take while `RotatedEWCCallback` consolidates."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from rotate_ewc.integrations.lightning import RotatedEWCCallback
from tests.helpers.exact import exact_penalty
from tests.helpers.lightning_training import CE, Module, data, trainer

pytestmark = pytest.mark.filterwarnings("ignore")


class BatchAlone(Module):
    def training_step(self, batch: Any) -> Any:
        return super().training_step(batch, 0)


class Third(Module):
    def training_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return super().training_step(batch, batch_idx)


class AnyNumber(Module):
    def training_step(self, *args: Any) -> Any:
        return super().training_step(*args)


class ByName(Module):
    def training_step(self, batch: Any, *, batch_idx: int = 0) -> Any:
        return super().training_step(batch, batch_idx)


class Pulls(Module):
    """Takes the iterator of batches itself; Lightning calls none of the hooks then."""

    def training_step(self, dataloader_iter: Iterator[Any]) -> Any:
        (x, y), index, _ = next(dataloader_iter)
        return super().training_step((x.to(self.dtype), y), index)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        raise AssertionError("fit does not call it")


class PullsTwo(Module):
    """Joins two batches in each step, and has nothing to join the last one with."""

    def training_step(self, dataloader_iter: Iterator[Any]) -> Any:
        pairs = [next(dataloader_iter)[0] for _ in range(2)]
        return super().training_step([torch.cat(parts) for parts in zip(*pairs, strict=True)], 0)


class PullsByHand(Pulls):
    """Optimizes by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, dataloader_iter: Iterator[Any]) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(dataloader_iter))
        optimizer.step()


def learn(folder: Path, module: Module, loader: Any, **options: Any) -> tuple[Any, ...]:
    """Learn two tasks; return the penalty, and what was logged."""
    penalty = exact_penalty(3.0, fisher_type="type2")
    for _ in range(2):
        run = trainer(folder, RotatedEWCCallback(penalty, CE), **options)
        run.fit(module, loader)
    return penalty, run.logged_metrics


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (BatchAlone, {}),
        (Third, {}),
        (AnyNumber, {}),
        (ByName, {}),
        (Pulls, {}),
        (Pulls, {"limit_train_batches": 2}),
        (Pulls, {"precision": "64-true"}),
        (PullsByHand, {}),
    ],
)
def test_every_form_of_a_step_ends_in_the_same_bits(
    tmp_path: Path, kind: type[Module], options: dict[str, Any]
) -> None:
    module, usual = kind(), Module()
    found, logged = learn(tmp_path, module, DataLoader(data(), 8), **options)
    expected, logged_then = learn(tmp_path, usual, DataLoader(data(), 8), **options)
    assert found.num_tasks == 2
    assert len(module.inputs) == len(usual.inputs)
    assert all(map(torch.equal, module.inputs, usual.inputs))
    assert logged == logged_then
    assert float(logged["rotated_ewc_penalty"]) > 0
    state, state_then = found.state_dict(), expected.state_dict()
    assert state.keys() == state_then.keys()
    assert all(torch.equal(state[key], value) for key, value in state_then.items())


def test_a_step_that_finds_no_more_batches(tmp_path: Path) -> None:
    """It ends the epoch, and the estimate takes the last batch too."""
    module = PullsTwo()
    penalty, _ = learn(tmp_path, module, DataLoader(data(), 8))
    assert [len(inputs) for inputs in module.inputs] == 4 * 2 * [16]
    twin = Module()
    own, optimizer = exact_penalty(3.0, fisher_type="type2"), twin.configure_optimizers()
    for _ in range(2):
        with own.attach(optimizer, twin):
            for x, y in 2 * [data()[:16], data()[16:32]]:
                optimizer.zero_grad()
                CE(twin(x), y).backward()
                optimizer.step()
        own.consolidate(twin, CE, DataLoader(data(), 8))
    assert torch.equal(module.net.weight, twin.net.weight)
    for name, value in own.state_dict().items():
        assert torch.equal(penalty.state_dict()[name], value)
