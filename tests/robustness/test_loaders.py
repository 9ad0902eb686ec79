"""What consolidation leaves of a loader, and what it makes of one that does not fit."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    RandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from rotate_ewc import EKFACLinearOperator, EKFACPenalty, SumOfLosses

CE = nn.CrossEntropyLoss()


SAME: Final = (
    r"expected the same .* in each pass: pass a list of the batches \(list\(data\), before"
)


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


# ------------------------------------------------------------------ passes that differ


class Passing:
    """Has another number of batches of four examples in each pass."""

    def __init__(self, *sizes: int) -> None:
        self.sizes = iter(sizes)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(next(self.sizes)):
            x, y = examples().tensors
            yield x[:4], y[:4]


class Stream(IterableDataset[Any]):
    """Is used up by one pass."""

    def __init__(self) -> None:
        self.left = iter([*examples()])

    def __iter__(self) -> Iterator[Any]:
        return self.left


ONE_ROUND: Final = {"temperature": 1.0, "memory_budget": 1}


@pytest.mark.parametrize(
    ("sizes", "options", "loss"),
    [
        pytest.param((8, 4), {}, CE, id="temperature, factors"),
        pytest.param((8, 4), ONE_ROUND, CE, id="factors, eigenvalues"),
        pytest.param((8, 8, 4), {"memory_budget": 2**10}, CE, id="temperature, eigenvalues"),
        pytest.param(
            (8, 4), {"temperature": 1.0}, SumOfLosses({"a": CE, "b": CE}), id="counts, factors"
        ),
    ],
)
def test_passes_of_different_lengths(sizes: tuple[int, ...], options: Any, loss: Any) -> None:
    model, penalty = net(), EKFACPenalty(1.0, **options)
    before = random_states()
    several = loss is not CE
    forward = (lambda x: {"a": model(x), "b": model(x)}) if several else None

    class Data(Passing):
        def __iter__(self) -> Iterator[Any]:
            for x, y in super().__iter__():
                yield x, ({"a": y, "b": y} if several else y)

    message = rf"^data gave 32 examples in one pass and 16 in a later one; {SAME}"
    with pytest.raises(ValueError, match=message):
        penalty.consolidate(model, loss, Data(*sizes), forward=forward)
    assert penalty.num_tasks == 0
    assert random_states() == before


def test_operators_see_it_too() -> None:
    model = net()
    for options in ({"check_deterministic": False, "memory_budget": 2**10}, {}):
        with pytest.raises(ValueError, match=r"^data gave 32 examples in one pass and 16 in a"):
            EKFACLinearOperator(model, CE, list(model.parameters()), Passing(8, 4), **options)


@pytest.mark.parametrize("options", [{}, {"memory_budget": 2**10}, ONE_ROUND])
def test_a_stream_that_is_used_up(options: Any) -> None:
    """And the remedy: its batches as a list, of which the matrix is that of the examples."""
    model, penalty = net(), EKFACPenalty(1.0, **options)
    with pytest.raises(ValueError, match=rf"^data gave batches in one pass and none .* up; {SAME}"):
        penalty.consolidate(model, CE, DataLoader(Stream(), 5))
    assert penalty.num_tasks == 0
    penalty.consolidate(model, CE, list(DataLoader(Stream(), 5)))
    assert penalty.terms[0].operator.num_data == 12


def test_a_loader_with_nothing_in_it_is_empty() -> None:
    with pytest.raises(ValueError, match=r"^data is empty; expected at least one batch"):
        EKFACPenalty(1.0).consolidate(net(), CE, Passing(0, 0))


def test_a_sampler_that_draws_other_examples_may_do_so() -> None:
    """As long as there are as many."""
    penalty, dataset = EKFACPenalty(1.0, memory_budget=2**10), examples()
    sampler = WeightedRandomSampler([1.0] * 12, 7)
    penalty.consolidate(net(), CE, DataLoader(dataset, 3, sampler=sampler), num_data=12)
    assert penalty.terms[0].operator.num_data == 12
    assert penalty.terms[0].operator.provenance.settings["num_data_seen"] == 7


@pytest.mark.parametrize("count", [1, 11])
def test_data_that_are_more_than_what_they_are_a_sample_of(count: int) -> None:
    model, penalty = net(), EKFACPenalty(1.0)
    loader: DataLoader[Any] = DataLoader(examples(), 5)
    message = rf"^num_data is {count}, but data has 12 examples; expected .* at least 12; or None"
    with pytest.raises(ValueError, match=message):
        penalty.consolidate(model, CE, loader, num_data=count)
    assert penalty.num_tasks == 0
    with pytest.raises(ValueError, match=message):
        EKFACLinearOperator(model, CE, list(model.parameters()), loader, num_data=count)
    for remedy in (12, None, 13):
        penalty.consolidate(model, CE, loader, num_data=remedy)
    assert penalty.terms[0].operator.num_data == 12 + 12 + 13
