"""Processes that each hold a whole penalty, made of all data by each of them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rotate_ewc import EKFACLinearOperator, EKFACPenalty
from tests.helpers.exact import exact_penalty
from tests.helpers.oracles import assert_close
from tests.helpers.penalties import CE, flat, make, task
from tests.helpers.processes import distributed_test, gather

STEPS, RATE = 3, 0.1


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


def train(model: nn.Module, penalty: EKFACPenalty, inputs: Tensor, targets: Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (CE(model(inputs), targets) + penalty(model)).backward()
        optimizer.step()


@distributed_test((2,), backends=["gloo"])
def test_the_same_seed_gives_all_processes_the_same_bits() -> None:
    torch.manual_seed(dist.get_rank())  # of different random states, as processes have them
    first, second = gather(estimate(7))
    assert torch.equal(first, second)
    assert not torch.equal(first, estimate(8)), "the seed does not matter here"


@distributed_test((2,), backends=["gloo"])
def test_training_on_shards_is_training_on_all_of_it() -> None:
    """`DistributedDataParallel` averages gradients, of which that of the penalty is the same."""
    data = task("plain", 1, 8)
    x, y = torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])
    shard = slice(dist.get_rank(), None, dist.get_world_size())
    model, penalty = consolidated()
    start = flat(model)
    train(DistributedDataParallel(model), penalty, x[shard], y[shard])
    first, second = gather(flat(model))
    assert torch.equal(first, second)

    whole, same = consolidated()
    train(whole, same, x, y)
    assert_close(first - start, flat(whole) - start)
    free, nothing = consolidated()
    nothing.strength = 0.0
    train(free, nothing, x, y)
    assert (flat(free) - flat(whole)).abs().max() > 1e-3, "the penalty does nothing here"
