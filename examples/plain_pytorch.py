"""Learn one task, stop, resume, learn another: with plain PyTorch, and without forgetting.

The tasks are scikit-learn's handwritten digits, as they are and with their pixels shuffled.
"""
# ruff: noqa: T201

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from rotate_ewc import EKFACPenalty


def make_task(pixels: torch.Tensor) -> list[DataLoader]:
    """Return training and test data, of the 64 pixels in a given order."""
    digits = load_digits()
    images, labels = torch.tensor(digits.data).float() / 16, torch.tensor(digits.target)
    data = TensorDataset(images[:, pixels], labels)
    return [DataLoader(part, 32, shuffle=True) for part in random_split(data, [0.8, 0.2])]


def train(model: nn.Module, data: DataLoader, penalty: EKFACPenalty) -> None:
    """Train as ever, with the penalty attached to the optimizer."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    penalty.attach(optimizer, model)  # does nothing before the first consolidation
    for x, y in (batch for _ in range(20) for batch in data):
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()


def accuracy(model: nn.Module, data: DataLoader) -> str:
    """Return the percentage of examples that are classified correctly."""
    hits = torch.cat([model(x).argmax(dim=1) == y for x, y in data])
    return f"{100 * hits.float().mean():5.1f} %"


torch.manual_seed(0)
train_1, test_1 = make_task(torch.arange(64))
train_2, test_2 = make_task(torch.randperm(64))
criterion = nn.CrossEntropyLoss()
model = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))
penalty = EKFACPenalty()
train(model, train_1, penalty)
penalty.consolidate(model, criterion, train_1)  # remember the task
torch.save({"model": model.state_dict(), "penalty": penalty.state_dict()}, "checkpoint.pt")
print("after the first task         task 1", accuracy(model, test_1))

for label in ("with the penalty", "without it"):
    state = torch.load("checkpoint.pt", weights_only=True)  # tensors and JSON, no pickled code
    model = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))
    model.load_state_dict(state["model"])
    penalty = EKFACPenalty()
    if label == "with the penalty":
        penalty.load_state_dict(state["penalty"])
    train(model, train_2, penalty)
    first, second = accuracy(model, test_1), accuracy(model, test_2)
    print(f"task 2, {label:20} task 1 {first}   task 2 {second}")
