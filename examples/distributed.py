"""Two tasks in two processes, without forgetting: `torchrun --nproc-per-node 2 distributed.py`.

With `DistributedDataParallel`; or, after `--fsdp`, with parameters that are spread over the
processes. The tasks are scikit-learn's handwritten digits, as they are and with shuffled pixels.
"""
# ruff: noqa: T201

import argparse
import time

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from rotate_ewc import EKFACPenalty


def make_task(seed: int | None) -> list[TensorDataset]:
    """Return training and test data; the pixels are shuffled if there is a seed."""
    digits = load_digits()
    images, labels = torch.tensor(digits.data).float() / 16, torch.tensor(digits.target)
    if seed is not None:
        images = images[:, torch.randperm(64, generator=torch.Generator().manual_seed(seed))]
    return [
        TensorDataset(images[:1500], labels[:1500]),
        TensorDataset(images[1500:], labels[1500:]),
    ]


def train(model: nn.Module, data: TensorDataset) -> None:
    """Train as ever, each process on its part, with the penalty attached to the optimizer."""
    sampler = DistributedSampler(data)
    loader = DataLoader(data, 50, sampler=sampler)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    with penalty.attach(optimizer, model):  # does nothing before the first consolidation
        for epoch in range(5):
            sampler.set_epoch(epoch)
            for x, y in loader:
                optimizer.zero_grad()
                criterion(model(x), y).backward()
                optimizer.step()


def show(name: str, model: nn.Module, *tests: TensorDataset) -> None:
    """Print the percentages of examples that are classified correctly."""
    with torch.no_grad():
        hits = [(model(x).argmax(dim=1) == y).float().mean() for x, y in (t.tensors for t in tests)]
    if dist.get_rank() == 0:
        print(f"{name:20}", "  ".join(f"task {i} {100 * h:5.1f} %" for i, h in enumerate(hits, 1)))


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--fsdp", action="store_true", help="spread the parameters over the processes")
arguments = parser.parse_args()
dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
if torch.cuda.is_available():
    torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    torch.set_default_device("cuda")
torch.manual_seed(0)
(train_1, test_1), (train_2, test_2) = make_task(None), make_task(1)
criterion, penalty = nn.CrossEntropyLoss(), EKFACPenalty()
network = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))
model = fully_shard(network) if arguments.fsdp else DistributedDataParallel(network)

train(model, train_1)
show("after the first task", model, test_1)
# Every process goes through its part of the data; all get the same penalty.
loader = DataLoader(train_1, 100, sampler=DistributedSampler(train_1, shuffle=False))
penalty.consolidate(model, criterion, loader)
train(model, train_2)
show("after the second", model, test_1, test_2)
dist.destroy_process_group()
time.sleep(0.5)  # gloo's threads let go of the last tensors: if Python ends before, it aborts
