"""Learn the classes of an image folder, two at a time, with a convolutional network.

Each pair of classes has a head of its own (task-incremental learning). The images are CIFAR-10 as
class folders, if `$ROTATE_EWC_DATA/cifar10` has them (`train/CLASS/*.jpg`), or else scikit-learn's
handwritten digits.
"""
# ruff: noqa: T201

# %%
# Each task is a pair of classes, with data for training and for testing.

import os
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from rotate_ewc import EKFACPenalty

TASKS, PER_CLASS = 4, 200


def load() -> tuple[Tensor, Tensor]:
    """Return images `[N, channels, height, width]` and their classes."""
    folder = Path(os.environ.get("ROTATE_EWC_DATA", "data")) / "cifar10" / "train"
    if folder.is_dir():
        from torchvision.datasets import ImageFolder
        from torchvision.transforms.functional import to_tensor

        found = ImageFolder(str(folder))
        start = [found.targets.index(kind) for kind in range(2 * TASKS)]
        chosen = [first + n for first in start for n in range(PER_CLASS)]
        images = torch.stack([to_tensor(found[index][0]) for index in chosen])
        return images, torch.tensor([found.targets[index] for index in chosen])
    from sklearn.datasets import load_digits

    digits = load_digits()
    return torch.tensor(digits.images).float()[:, None] / 16, torch.tensor(digits.target)


def make_task(number: int) -> list[DataLoader]:
    """Return training and test data of two classes, labelled 0 and 1."""
    of_task = (labels // 2 == number).nonzero().flatten()
    of_task = of_task[torch.randperm(len(of_task))]
    data = TensorDataset(images[of_task], labels[of_task] % 2)
    cut = 3 * len(data) // 4
    parts = (
        torch.utils.data.Subset(data, range(cut)),
        torch.utils.data.Subset(data, range(cut, len(data))),
    )
    return [DataLoader(part, 25, shuffle=True) for part in parts]


# %%
# The body is shared by all tasks, and each task has a head of its own. `forward` chooses the head.
# A head is protected as soon as it has been used.


class Network(nn.Module):
    """Three convolutions, and a head for each task."""

    def __init__(self, channels: int) -> None:
        """Make the layers."""
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        )  # fmt: skip
        self.heads = nn.ModuleList(nn.Linear(128, 2) for _ in range(TASKS))

    def forward(self, x: Tensor, task: int) -> Tensor:
        """Return logits of a task's classes."""
        return self.heads[task](self.body(x))


def accuracy(model: Network, task: int) -> float:
    """Return the percentage of a task's test images that are classified correctly."""
    hits = [model(x, task).argmax(dim=1) == y for x, y in tasks[task][1]]
    return 100 * float(torch.cat(hits).float().mean())


# %%
# The loop: attach, train, consolidate. `forward` tells `consolidate` which head a batch goes to.


def learn(model: Network, task: int, penalty: EKFACPenalty | None) -> None:
    """Train on a task and, if there is a penalty, under it; then remember the task."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    if penalty is not None:
        penalty.attach(optimizer, model)
    for x, y in (batch for _ in range(8) for batch in tasks[task][0]):
        optimizer.zero_grad()
        criterion(model(x, task), y).backward()
        optimizer.step()
    if penalty is not None:
        penalty.consolidate(model, criterion, tasks[task][0], forward=lambda x: model(x, task))


torch.manual_seed(0)
images, labels = load()
tasks = [make_task(number) for number in range(TASKS)]
criterion = nn.CrossEntropyLoss()
for name, penalty in (("with the penalty", EKFACPenalty()), ("without it", None)):
    torch.manual_seed(0)
    model = Network(images.shape[1])
    learned = []
    for task in range(TASKS):
        learn(model, task, penalty)
        learned.append(accuracy(model, task))
    for when, found in (
        ("when learned", learned),
        ("in the end", [accuracy(model, task) for task in range(TASKS)]),
    ):
        print(f"{name:17} {when:13}", "  ".join(f"{number:5.1f} %" for number in found))
