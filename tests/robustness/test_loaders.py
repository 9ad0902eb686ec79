"""What consolidation leaves of a loader, and what it makes of one that does not fit."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset, WeightedRandomSampler

from rotate_ewc import EKFACLinearOperator, EKFACPenalty

CE = nn.CrossEntropyLoss()


def examples(n: int = 12) -> TensorDataset:
    generator = torch.Generator().manual_seed(n)
    return TensorDataset(torch.randn(n, 4, generator=generator), torch.arange(n) % 3)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 3)


class Broken(TensorDataset):
    """Has an example that cannot be read."""

    def __getitem__(self, index: int) -> Any:
        if index == 7:
            raise KeyError(index)
        return super().__getitem__(index)


def random_states() -> list[Any]:
    return [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]


# ------------------------------------------------------------------ random states


def with_sampler(dataset: TensorDataset, generator: torch.Generator | None) -> DataLoader[Any]:
    return DataLoader(dataset, 5, sampler=RandomSampler(dataset, generator=generator))


def with_weights(dataset: TensorDataset, generator: torch.Generator | None) -> DataLoader[Any]:
    sampler = WeightedRandomSampler([1.0] * len(dataset), len(dataset), generator=generator)
    return DataLoader(dataset, 5, sampler=sampler, generator=generator)


LOADERS = {
    "in order": lambda d, g: DataLoader(d, 5, generator=g),
    "shuffled": lambda d, g: DataLoader(d, 5, shuffle=True, generator=g),
    "sampler": with_sampler,
    "weighted sampler": with_weights,
    "workers": lambda d, g: DataLoader(d, 5, shuffle=True, generator=g, num_workers=1),
}


@pytest.mark.parametrize("own", [False, True], ids=["global", "own generator"])
@pytest.mark.parametrize("temperature", ["auto", 1.0])
@pytest.mark.parametrize("name", LOADERS)
def test_consolidation_draws_nothing(name: str, temperature: Any, own: bool) -> None:
    model, penalty = net(), EKFACPenalty(1.0, temperature=temperature)
    generator = torch.Generator().manual_seed(5) if own else None
    loader = LOADERS[name](examples(), generator)
    next(iter(loader))
    expected = random_states(), generator and generator.get_state().tolist()
    penalty.consolidate(model, CE, loader)
    assert penalty.num_tasks == 1
    assert (random_states(), generator and generator.get_state().tolist()) == expected


@pytest.mark.parametrize("own", [False, True], ids=["global", "own generator"])
@pytest.mark.parametrize("temperature", ["auto", 1.0])
def test_nor_does_one_that_fails(temperature: Any, own: bool) -> None:
    model, penalty = net(), EKFACPenalty(1.0, temperature=temperature)
    generator = torch.Generator().manual_seed(5) if own else None
    loader = DataLoader(Broken(*examples().tensors), 5, shuffle=True, generator=generator)
    expected = random_states(), generator and generator.get_state().tolist()
    with pytest.raises(KeyError):
        penalty.consolidate(model, CE, loader)
    assert (random_states(), generator and generator.get_state().tolist()) == expected


def test_training_goes_on_as_without_a_penalty() -> None:
    """By a plain loop over the same loader."""

    def trained(*, consolidate: bool) -> Tensor:
        model = net()
        loader: DataLoader[Any] = DataLoader(examples(), 5, shuffle=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            for x, y in loader:
                optimizer.zero_grad()
                CE(model(x), y).backward()
                optimizer.step()
            if consolidate:
                EKFACPenalty(1.0).consolidate(model, CE, loader)
        return next(model.parameters()).detach()

    assert torch.equal(trained(consolidate=True), trained(consolidate=False))


@pytest.mark.parametrize("own", [False, True], ids=["global", "own generator"])
def test_an_operator_draws_nothing_either(own: bool) -> None:
    model = net()
    generator = torch.Generator().manual_seed(5) if own else None
    loader: DataLoader[Any] = DataLoader(examples(), 5, shuffle=True, generator=generator)
    expected = random_states(), generator and generator.get_state().tolist()
    EKFACLinearOperator(model, CE, list(model.parameters()), loader, fisher_type="type2")
    assert (random_states(), generator and generator.get_state().tolist()) == expected


@pytest.mark.parametrize("own", [False, True], ids=["global", "own generator"])
def test_the_temperature_is_found_in_the_order_of_the_first_pass(own: bool) -> None:
    orders: list[list[float]] = []

    class Watched(DataLoader[Any]):
        def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
            order: list[float] = []
            orders.append(order)
            for x, y in super().__iter__():
                order += x[:, 0].tolist()
                yield x, y

    generator = torch.Generator().manual_seed(5) if own else None
    EKFACPenalty(1.0).consolidate(net(), CE, Watched(examples(), 5, True, generator=generator))
    assert len(orders) == 2  # the second pass has everything in memory
    assert orders[0] == orders[1]
    assert orders[0] != examples().tensors[0][:, 0].tolist()


def test_a_loader_is_not_started_to_see_whether_it_can_be() -> None:
    """That would start its processes, only to end them."""
    started: list[int] = []

    class Watched(DataLoader[Any]):
        def __iter__(self) -> Any:
            started.append(1)
            return super().__iter__()

    EKFACPenalty(1.0, temperature=1.0).consolidate(net(), CE, Watched(examples(), 5))
    assert len(started) == 1
