"""Several rounds, where the factors of all blocks would take more than the memory budget."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rotate_ewc import EKFACLinearOperator
from rotate_ewc.distributed.processes import Ranks
from rotate_ewc.estimation import rounds
from rotate_ewc.estimation.factors import KroneckerFactors, Place, decompose
from rotate_ewc.linalg.block import Block
from rotate_ewc.tracing.block_plan import BlockKey
from tests.helpers.oracles import assert_close, dense_empirical_fisher

CE = nn.CrossEntropyLoss()
SIZES = (30, 24, 18, 4)


class Counting(nn.Sequential):
    """Layers that are used, and how often."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y: Tensor = super().forward(x)
        return y


def network() -> Counting:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for d_in, d_out in pairwise(SIZES):
        layers += [nn.Linear(d_in, d_out), nn.Tanh()]
    return Counting(*layers).double()


def data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(60, SIZES[0], generator=generator, dtype=torch.float64)
    y = torch.randint(SIZES[-1], (60,), generator=generator)
    return list(zip(x.split(20), y.split(20), strict=True))


def estimated(model: nn.Module, budget: int, **options: Any) -> EKFACLinearOperator:
    options = {"fisher_type": "empirical", "check_deterministic": False, **options}
    params = list(model.parameters())
    return EKFACLinearOperator(model, CE, params, data(), memory_budget=budget, **options)


@cache
def exact_of_network() -> Tensor:
    return exact_matrix(network())


def exact_matrix(model: nn.Module) -> Tensor:
    x, y = (torch.cat(parts) for parts in zip(*data(), strict=True))
    return dense_empirical_fisher(model, CE, [n for n, _ in model.named_parameters()], x, y)


# In float64: 30² + 24² entries, and for the bias nothing; 24² + 18²; 18² + 4².
@pytest.mark.parametrize(("budget", "expected"), [(2**30, 1), (20_000, 2), (9_000, 3)])
def test_no_more_factors_at_a_time_than_fit(
    monkeypatch: pytest.MonkeyPatch, budget: int, expected: int
) -> None:
    taken: list[int] = []

    def measured(
        factors: Mapping[BlockKey, KroneckerFactors], leaders: Mapping[Place, Place], ranks: Ranks
    ) -> dict[BlockKey, Block]:
        sides = [
            s for f in factors.values() for s in (f.gradient_covariance, f.activation_covariance)
        ]
        taken.append(sum(8 * s.diagonal.shape[1] ** 2 for s in sides if s is not None))
        return decompose(factors, leaders, ranks)

    monkeypatch.setattr(rounds, "decompose", measured)
    model = network()
    operator = estimated(model, budget)
    assert len(taken) == expected
    # One block is the least.
    assert max(taken) <= max(budget, 8 * (30**2 + 24**2))
    assert [b.label for b in operator.blocks] == [n for n, _ in model.named_parameters()]
    # All batches once in each pass; what is cached is not shown again.
    assert 3 * expected <= model.calls <= 6 * expected


@pytest.mark.parametrize("budget", [20_000, 9_000, 1])
@pytest.mark.parametrize("rank", ["full", 3])
def test_what_is_found_is_exact_whatever_the_rounds(budget: int, rank: Any) -> None:
    """The trace, and for few examples the whole matrix, of all blocks."""
    model = network()
    operator = estimated(model, budget, rank=rank)
    exact = exact_of_network()
    assert float(operator.trace) == pytest.approx(float(exact.trace()), rel=1e-10)
    start = 0
    for block in operator.blocks:
        size = sum(p.numel() for n, p in model.named_parameters() if n in block.parameters)
        own = exact[start : start + size, start : start + size]
        assert float(block.trace) == pytest.approx(float(own.trace()), rel=1e-10)
        start += size


def test_sampled_labels_are_the_same_in_all_rounds() -> None:
    one, several = (estimated(network(), b, fisher_type="mc", seed=3) for b in (2**30, 1))
    for block, other in zip(one.blocks, several.blocks, strict=True):
        assert_close(other.trace, block.trace)
        for found, expected in zip(other.partial_traces, block.partial_traces, strict=True):
            assert_close(found.sort().values, expected.sort().values)


def test_parameters_without_a_rule_are_seen_once() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = network()
            self.recurrent = nn.RNN(3, 4, batch_first=True).double()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layers(x) + self.recurrent(x.unflatten(1, (10, 3)))[0][:, -1]
            return y

    torch.manual_seed(0)
    model = Odd()
    with pytest.warns(UserWarning, match="there is no rule"):
        operator = estimated(model, 1, unsupported="diagonal")
    exact = exact_matrix(model)
    assert float(operator.trace) == pytest.approx(float(exact.trace()), rel=1e-10)
