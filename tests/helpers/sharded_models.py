"""Models whose parameters are spread over processes by `fully_shard`, and their data."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.helpers.penalties import CE, Batches
from tests.helpers.processes import here

STEPS = 5


class Net(nn.Module):
    """Odd sizes, of which some processes have no row; a tied weight, a norm, a frozen bias."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Linear(5, 7), nn.LayerNorm(7)
        self.inner = nn.Sequential(nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 5))
        self.last = nn.Linear(5, 1)
        self.head = nn.Linear(1, 3)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(self.norm(torch.tanh(self.first(x))))
        outputs: Tensor = self.head(self.last(x))
        return outputs


def sharded(reshard: bool = True, mesh: Any = None, **options: Any) -> nn.Module:
    model = here(Net(options.pop("dtype", torch.float64)))
    for part in (model.inner, model):
        fully_shard(part, mesh=mesh, reshard_after_forward=reshard, **options)
    return model


def batches(seed: int, dtype: torch.dtype = torch.float64) -> Batches:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(24, 5, dtype=torch.float64, generator=generator).to(dtype)
    return [(x, torch.randint(3, (24,), generator=generator))]


def own(data: Batches) -> Batches:
    batch = part_of(data)
    if dist.get_rank():
        return batch
    # Processes need not run the model equally often.
    ((x, y),) = batch
    return list(zip(x.split(1), y.split(1), strict=True))


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


def assert_close(
    found: Tensor, expected: Tensor, tolerance: float = 1e-9, label: object = ""
) -> None:
    error = float((found - expected).abs().max())
    assert error <= tolerance * float(expected.abs().max()), f"{label}: {error}"


def step(model: nn.Module, optimizer: torch.optim.Optimizer, data: Batches) -> None:
    optimizer.zero_grad()
    ((x, y),) = data
    CE(model(x), y).backward()
    optimizer.step()


def part_of(data: Batches) -> Batches:
    part = slice(dist.get_rank(), None, dist.get_world_size())
    ((x, y),) = data
    return here([(x[part], y[part])])


def of_first(make: Any) -> list[Any]:
    """What the first process makes, in all."""
    found = [make() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found)
    return found
