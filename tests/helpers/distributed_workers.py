"""What the processes of the tests in `tests/distributed` do."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rotate_ewc import EKFACLinearOperator, EKFACPenalty
from tests.helpers.exact import exact_penalty
from tests.helpers.penalties import CE, flat, make, task

PROCESSES, STEPS, RATE = 2, 3, 0.1


def estimate(seed: int) -> Tensor:
    """A matrix whose labels are drawn at random, written out."""
    model = make("plain")
    parameters = dict(model.named_parameters())
    data = task("plain", 0)
    return EKFACLinearOperator(
        model, CE, parameters, data, group=None, fisher_type="mc", seed=seed
    ).to_dense()


def consolidated() -> tuple[nn.Module, EKFACPenalty]:
    model, penalty = make("plain"), exact_penalty(50.0, seed=3)
    penalty.consolidate(model, CE, task("plain", 0), group=None)
    return model, penalty


def batch() -> tuple[Tensor, Tensor]:
    """What a step of all processes together learns from: 8 examples."""
    data = task("plain", 1, 8)
    return torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])


def train(model: nn.Module, penalty: EKFACPenalty, inputs: Tensor, targets: Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (CE(model(inputs), targets) + penalty(model)).backward()
        optimizer.step()


def work(rank: int, folder: str) -> None:
    """Estimate all the data, train on a shard, and write down what all processes have."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=PROCESSES,
        timeout=timedelta(seconds=100),
    )
    torch.manual_seed(rank)  # of different random states, as processes have them
    torch.set_num_threads(1)
    found = {"same": estimate(7), "other": estimate(8)}
    model, penalty = consolidated()
    inputs, targets = batch()
    shard = slice(rank, None, PROCESSES)
    wrapped = DistributedDataParallel(model)
    train(wrapped, penalty, inputs[shard], targets[shard])
    found["trained"] = flat(model)
    for name, tensor in found.items():
        of_all = [torch.empty_like(tensor) for _ in range(PROCESSES)]
        dist.all_gather(of_all, tensor)
        if rank == 0:
            torch.save(of_all, Path(folder, f"{name}.pt"))
    dist.destroy_process_group()
