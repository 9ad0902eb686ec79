"""Callbacks that consolidate leave random states, also those of loaders, as they found them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from rotate_ewc import EKFACPenalty
from rotate_ewc.integrations.lightning import RotatedEWCCallback as LightningCallback
from rotate_ewc.integrations.transformers import RotatedEWCCallback as TrainersCallback
from tests.helpers import lightning_training
from tests.helpers.hf_training import task, tiny_gpt2, trainer

pytestmark = pytest.mark.filterwarnings("ignore")


class Witness(TrainerCallback, lightning.Callback):
    """Sees the random states when training begins, and when it ends."""

    def __init__(self, generator: torch.Generator | None = None) -> None:
        self.generator = generator or torch.Generator()
        self.states: list[Tensor] = []

    def look(self, *args: Any, **kwargs: Any) -> None:
        self.states += [torch.get_rng_state(), self.generator.get_state()]

    on_train_begin = on_train_start = on_train_end = look


def assert_nothing_was_drawn(before: Witness, after: Witness) -> None:
    assert len(before.states) in (4, 6)
    assert len(before.states) == len(after.states)
    assert all(map(torch.equal, before.states, after.states))


def test_trainer(tmp_path: Path) -> None:
    before, after, penalty = Witness(), Witness(), EKFACPenalty(1.0)
    callbacks = [before, TrainersCallback(penalty), after]
    trainer(tmp_path, tiny_gpt2(), callbacks, task(1, 4), max_steps=2).train()
    assert penalty.num_tasks == 1
    assert_nothing_was_drawn(before, after)


class Language(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = tiny_gpt2()

    def training_step(self, batch: Any, index: int) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Linear(4, 3)

    def training_step(self, batch: Any, index: int) -> Tensor:
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("kind", ["own loss", "loss_func"])
def test_lightning(tmp_path: Path, kind: str) -> None:
    penalty, generator = EKFACPenalty(1.0), torch.Generator().manual_seed(3)
    before, after = Witness(generator), Witness(generator)
    data: Any = task(1, 4) if kind == "own loss" else [(torch.ones(4), i % 3) for i in range(4)]
    loader: DataLoader[Any] = DataLoader(data, 2, shuffle=True, generator=generator)
    loss_func = None if kind == "own loss" else nn.CrossEntropyLoss()
    callback = LightningCallback(penalty, loss_func, submodule="model")
    run = lightning_training.trainer(tmp_path, before, callback, after, max_epochs=1)
    run.fit(Language() if kind == "own loss" else Classifier(), loader)
    assert penalty.num_tasks == 1
    assert_nothing_was_drawn(before, after)
    assert not torch.equal(generator.get_state(), torch.Generator().manual_seed(3).get_state())
