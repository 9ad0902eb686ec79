"""Learn two tasks with Lightning, one after the other, and without forgetting.

The tasks are scikit-learn's handwritten digits, as they are and with their pixels shuffled.
"""
# ruff: noqa: T201

import logging
import warnings

import lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from rotate_ewc import EKFACPenalty
from rotate_ewc.integrations.lightning import RotatedEWCCallback


class Classifier(lightning.LightningModule):
    """A module as any other."""

    def __init__(self) -> None:
        """Make the layers."""
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        return self.layers(x)

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        """Return the loss."""
        x, y = batch
        return criterion(self(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return an optimizer."""
        return torch.optim.Adam(self.parameters(), lr=2e-3)


def make_task(pixels: torch.Tensor) -> list[DataLoader]:
    """Return training and test data, of the 64 pixels in a given order."""
    digits = load_digits()
    images, labels = torch.tensor(digits.data).float() / 16, torch.tensor(digits.target)
    data = TensorDataset(images[:, pixels], labels)
    return [DataLoader(part, 32, shuffle=True) for part in random_split(data, [0.8, 0.2])]


def accuracy(model: nn.Module, data: DataLoader) -> str:
    """Return the percentage of examples that are classified correctly."""
    hits = torch.cat([model(x).argmax(dim=1) == y for x, y in data])
    return f"{100 * hits.float().mean():5.1f} %"


logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning")
criterion = nn.CrossEntropyLoss()
for name in ("with the penalty", "without it"):
    lightning.seed_everything(0, verbose=False)
    tasks = [make_task(torch.arange(64)), make_task(torch.randperm(64))]
    model, penalty = Classifier(), EKFACPenalty()
    callbacks = [RotatedEWCCallback(penalty, criterion)] if name == "with the penalty" else []
    for train_data, _ in tasks:
        trainer = lightning.Trainer(
            max_epochs=10, callbacks=callbacks, accelerator="cpu", logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(model, train_data)
    first, second = (accuracy(model, test_data) for _, test_data in tasks)
    print(f"{name:17} task 1 {first}   task 2 {second}")
