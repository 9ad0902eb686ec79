"""A training loop with accelerate that does not forget, and stops and resumes.

Run it with `accelerate launch accelerate_loop.py`, or as any program. The tasks are scikit-learn's
handwritten digits, as they are and with their pixels shuffled.
"""
# ruff: noqa: T201

import torch
from accelerate import Accelerator
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


def train(data: DataLoader) -> None:
    """Train on a task, and remember it."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, data)
    handle = penalty.attach(optimizer, prepared)  # finds the optimizer inside accelerate's own
    for x, y in (batch for _ in range(20) for batch in loader):
        optimizer.zero_grad()
        accelerator.backward(criterion(prepared(x), y))
        optimizer.step()
    handle.detach()
    penalty.consolidate(prepared, criterion, loader)


def accuracy(data: DataLoader) -> str:
    """Return the percentage of examples that are classified correctly."""
    device = accelerator.device
    hits = torch.cat([model(x.to(device)).argmax(dim=1).cpu() == y for x, y in data])
    return f"{100 * hits.float().mean():5.1f} %"


accelerator = Accelerator()
torch.manual_seed(0)
tasks = [make_task(torch.arange(64)), make_task(torch.randperm(64))]
criterion = nn.CrossEntropyLoss()
model = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))
penalty = EKFACPenalty()
# `save_state` and `load_state` take the penalty along with everything that was prepared.
accelerator.register_for_checkpointing(penalty)
for number, (train_data, _) in enumerate(tasks, start=1):
    train(train_data)
    accelerator.save_state("checkpoint")
    told = "   ".join(f"task {i} {accuracy(test)}" for i, (_, test) in enumerate(tasks, start=1))
    print(f"after task {number}: {told}")

weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
before = float(penalty({name: weight + 0.01 for name, weight in weights.items()}))
accelerator.load_state("checkpoint")
after = float(penalty({name: weight + 0.01 for name, weight in weights.items()}))
print(f"the penalty is what it was: {before == after}")
