"""A penalty in the middle of its life, all that a failure could change of it, and ways to fail."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rotate_ewc import EKFACPenalty
from tests.helpers.exact import exact_penalty
from tests.helpers.model_state import ModelState
from tests.helpers.penalties import CE, Batches

NUM_BATCHES = 3
ONE_PASS, TWO_PASSES = 2**30, 1


class Counter(nn.Module):
    """Counts its calls in a buffer, also in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x


def network() -> nn.Module:
    """A convolution, a normalisation, linear layers; some of it in eval mode, one bias frozen."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(2, 3, 2),
        nn.BatchNorm1d(3),
        nn.Tanh(),
        Counter(),
        nn.Flatten(),
        nn.Linear(9, 4),
        nn.Dropout(0.5),
        nn.Linear(4, 3),
    ).double()
    model[6].eval()
    model[5].bias.requires_grad_(False)
    return model


def task(seed: int) -> Batches:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(n, 2, 4, generator=generator, dtype=torch.float64),
            torch.randint(3, (n,), generator=generator),
        )
        for n in (3, 1, 2)
    ]


@dataclass
class State:
    """All that a failed consolidation could have changed."""

    model: ModelState
    optimizer: dict[str, Any]
    penalty: dict[str, Any]
    value: float
    num_tasks: int
    terms: tuple[Any, ...]
    threads: int


@dataclass
class World:
    """A model with an optimizer, and a penalty that knows one task."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    penalty: EKFACPenalty

    def consolidate(self, data: Any = None, forward: Any = None, seed: int = 1) -> None:
        data = task(seed) if data is None else data
        self.penalty.consolidate(self.model, CE, data, forward=forward)

    def state(self) -> State:
        return State(
            ModelState.of(self.model),
            copy.deepcopy(self.optimizer.state_dict()),
            copy.deepcopy(self.penalty.state_dict()),
            self.penalty(self.model).item(),
            self.penalty.num_tasks,
            self.penalty.terms,
            torch.get_num_threads(),
        )

    def assert_unchanged(self, before: State) -> None:
        before.model.assert_unchanged(self.model)
        now = self.state()
        assert same(now.optimizer, before.optimizer)
        assert same(now.penalty, before.penalty)
        assert (now.value, now.num_tasks) == (before.value, before.num_tasks)
        assert len(now.terms) == len(before.terms)
        assert all(a is b for a, b in zip(now.terms, before.terms, strict=True))
        assert now.threads == before.threads

    def assert_goes_on(self, mode: str, budget: int = ONE_PASS) -> None:
        """The same call succeeds, as if nothing had happened."""
        untouched = world(mode, budget)
        untouched.consolidate()
        self.consolidate()
        assert self.penalty.num_tasks == 2
        assert same(self.penalty.state_dict(), untouched.penalty.state_dict())


def world(mode: str = "merged", budget: int = ONE_PASS) -> World:
    """Train a step, consolidate a task, and train another step; always the same."""
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    penalty = exact_penalty(3.0, mode, memory_budget=budget)
    made = World(model, optimizer, penalty)
    for seed in (0, 1):
        ((x, y), *_) = task(seed)
        optimizer.zero_grad()
        (CE(model(x), y) + penalty(model)).backward()
        optimizer.step()
        if seed == 0:
            made.consolidate(seed=0)
    return made


def same(first: Any, second: Any) -> bool:
    """Whether nested values are the same, tensors bit for bit."""
    if isinstance(first, Tensor):
        return (
            isinstance(second, Tensor)
            and first.dtype == second.dtype
            and torch.equal(first, second)
        )
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


class FailingLoader:
    """Data whose k-th batch, counted over all passes, is an error."""

    def __init__(self, fails_at: int, error: BaseException) -> None:
        self.left, self.error = fails_at, error

    def __len__(self) -> int:
        return NUM_BATCHES

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in task(1):
            if self.left == 0:
                raise self.error
            self.left -= 1
            yield batch


def failing(function: Callable[..., Any], fails_at: int, error: BaseException) -> Any:
    """Wrap a function so that its k-th call raises instead."""
    left = fails_at

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= 1
        if left == -1:
            raise error
        return function(*args, **kwargs)

    return wrapped
