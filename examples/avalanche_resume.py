"""Learn five tasks with Avalanche; stop the program when you like, and start it again to go on.

The tasks are scikit-learn's handwritten digits, with their pixels in a new order for each.
"""
# ruff: noqa: T201

import warnings
from pathlib import Path

import dill
import torch
from avalanche.benchmarks import benchmark_from_datasets
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.checkpointing import maybe_load_checkpoint, save_checkpoint
from avalanche.training.plugins import EvaluationPlugin
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

from rotate_ewc.integrations.avalanche import RotatedEWC


def make_task(seed: int) -> TensorDataset:
    """Return all images, with the 64 pixels in an order of their own."""
    order = torch.randperm(64, generator=torch.Generator().manual_seed(seed))
    data = TensorDataset(torch.tensor(digits.data).float()[:, order] / 16, labels)
    data.targets = digits.target.tolist()
    return as_classification_dataset(data)


def accuracy(task: int) -> str:
    """Return the percentage of a task's images that are classified correctly."""
    with torch.no_grad():
        x = torch.stack([x for x, _ in benchmark.train_stream[task].dataset])
        return f"{100 * (strategy.model(x).argmax(dim=1) == labels).float().mean():5.1f} %"


dill.settings["byref"] = True  # or else classes of PyTorch cannot be pickled
warnings.filterwarnings("ignore", category=dill.PicklingWarning)
torch.manual_seed(0)
digits = load_digits()
labels = torch.tensor(digits.target)
benchmark = benchmark_from_datasets(train=[make_task(seed) for seed in range(5)])
model = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
strategy = RotatedEWC(
    model=model, optimizer=optimizer,
    train_mb_size=32, train_epochs=5, evaluator=EvaluationPlugin(),
)  # fmt: skip
checkpoint = Path("checkpoint.dill")
strategy, done = maybe_load_checkpoint(strategy, checkpoint)  # 0 at the first start
for task, experience in enumerate(benchmark.train_stream[done:], start=done):
    strategy.train(experience)
    save_checkpoint(strategy, checkpoint)
    accuracies = "  ".join(accuracy(learned) for learned in range(task + 1))
    print(f"after task {task + 1}: {accuracies}", flush=True)
