"""Processes that each hold a whole penalty."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing

from tests.helpers.distributed_workers import PROCESSES, batch, consolidated, train, work
from tests.helpers.oracles import assert_close
from tests.helpers.penalties import flat

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(not dist.is_gloo_available(), reason="PyTorch was built without gloo"),
]

Found = Callable[[str], list[Tensor]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What each process has, by name, after all have run once."""
    folder = tmp_path_factory.mktemp("processes")
    multiprocessing.spawn(work, (str(folder),), nprocs=PROCESSES)
    return lambda name: torch.load(Path(folder, f"{name}.pt"), weights_only=True)


def test_the_same_seed_gives_all_processes_the_same_bits(found: Found) -> None:
    first, second = found("same")
    assert torch.equal(first, second)
    assert not torch.equal(first, found("other")[0]), "the seed does not matter here"


def test_training_on_shards_is_training_on_all_of_it(found: Found) -> None:
    """`DistributedDataParallel` averages gradients, of which that of the penalty is the same."""
    model, penalty = consolidated()
    start = flat(model)
    train(model, penalty, *batch())
    first, second = found("trained")
    assert torch.equal(first, second)
    assert_close(first - start, flat(model) - start)
    free, nothing = consolidated()
    nothing.strength = 0.0
    train(free, nothing, *batch())
    assert (flat(free) - flat(model)).abs().max() > 1e-3, "the penalty does nothing here"
