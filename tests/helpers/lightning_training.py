"""Lightning for tests: a `Trainer` without files but those asked for, a module, and its data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from rotate_ewc import EKFACPenalty
from tests.helpers.exact import exact_penalty

CE = nn.CrossEntropyLoss()


def trainer(folder: Path, *callbacks: Any, **options: Any) -> lightning.Trainer:
    """Return one that works on the CPU, in silence."""
    chosen = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "default_root_dir": str(folder),
        "num_sanity_val_steps": 0,
        **options,
    }
    return lightning.Trainer(callbacks=list(callbacks), **chosen)


class Module(lightning.LightningModule):
    """A linear classifier that keeps the inputs of its steps.

    Attributes:
        rate: The learning rate.
    """

    rate = 0.1

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(6, 3)
        self.inputs: list[Tensor] = []

    def forward(self, x: Tensor) -> Any:
        return self.net(x)

    def training_step(self, batch: Any, index: int) -> Any:
        self.inputs.append(batch[0])
        return CE(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.rate)


def data(size: int = 40) -> TensorDataset:
    """Return examples for it; the class is the place of the largest of the first three inputs."""
    x = torch.randn(size, 6, generator=torch.Generator().manual_seed(1))
    return TensorDataset(x, x[:, :3].argmax(dim=1))


def assert_same(penalty: EKFACPenalty, module: nn.Module, batches: Any) -> None:
    """Assert that a penalty is that of the module's present solution on some batches."""
    known = exact_penalty(fisher_type="type2")
    known.consolidate(module, CE, batches)
    # Not the same for all logits, of which a softmax would take no notice.
    moved = {name: p.double() + torch.randn_like(p) for name, p in module.named_parameters()}
    assert float(known(moved)) > 0.01
    assert float(penalty(moved)) == pytest.approx(float(known(moved)), rel=1e-4)
