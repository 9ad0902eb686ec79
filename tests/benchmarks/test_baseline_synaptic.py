"""Synaptic intelligence against plain loops."""

from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from benchmarks.avalanche_names import SynapticIntelligencePlugin
from benchmarks.baselines import SynapticIntelligence
from benchmarks.baselines.synaptic_intelligence import DAMPING
from tests.benchmarks.helpers import Rows

RATE = 0.05
STRENGTH = 0.7
STEPS = 6


def make_task(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(12, 3, generator=generator, dtype=torch.float64)
    return inputs, torch.randn(12, 2, generator=generator, dtype=torch.float64)


def make_model() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2, dtype=torch.float64)


def by_plugin(
    plugin, tasks: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype = torch.float64
) -> nn.Linear:
    """Train with a plugin's callbacks, called as Avalanche calls them."""
    model = make_model().to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    strategy = SimpleNamespace(
        model=model,
        optimizer=optimizer,
        device=torch.device("cpu"),
        experience=SimpleNamespace(dataset=Rows(torch.zeros(1, 1))),
        clock=SimpleNamespace(train_exp_counter=0),
    )
    for inputs, targets in tasks:
        plugin.before_training_exp(strategy)
        for _ in range(STEPS):
            plugin.before_training_iteration(strategy)
            optimizer.zero_grad()
            strategy.loss = ((model(inputs.to(dtype)) - targets.to(dtype)) ** 2).mean()
            plugin.before_backward(strategy)
            strategy.loss.backward()
            plugin.before_update(strategy)
            optimizer.step()
            plugin.after_update(strategy)
            plugin.after_training_iteration(strategy)
        plugin.after_training_exp(strategy)
        strategy.clock.train_exp_counter += 1
    return model


def by_loop(tasks: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The paper's equations, on the weight and bias as one vector, with a gradient by formula."""
    model = make_model()
    theta = torch.cat([model.weight.detach(), model.bias.detach()[:, None]], 1)
    importance = torch.zeros_like(theta)
    for inputs, targets in tasks:
        extended = torch.cat([inputs, torch.ones(len(inputs), 1, dtype=torch.float64)], 1)
        anchor, gain = theta.clone(), torch.zeros_like(theta)
        for _ in range(STEPS):
            residual = extended @ theta.T - targets
            gradient = 2 * residual.T @ extended / residual.numel()
            step = -RATE * (gradient + 2 * STRENGTH * importance * (theta - anchor))
            gain = gain - gradient * step
            theta = theta + step
        share = gain / ((theta - anchor) ** 2 + DAMPING)
        importance = importance + torch.where(share > 0, share, 0.0)
    return theta, importance


def test_training_follows_the_equations_of_the_paper() -> None:
    tasks = [make_task(seed) for seed in range(3)]
    model = by_plugin(SynapticIntelligence(STRENGTH), tasks)
    theta, importance = by_loop(tasks)
    found = torch.cat([model.weight, model.bias[:, None]], 1)
    torch.testing.assert_close(found, theta, rtol=1e-12, atol=1e-12)
    assert importance.max() > 1e-3, "or else this would hold without any penalty too"


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")
def test_avalanches_own_protects_nothing_on_a_cpu() -> None:
    """The reason for ours; once this fails, ours may go."""
    tasks = [make_task(seed) for seed in range(2)]
    plain, protected = (by_plugin(_Quiet(strength), tasks, torch.float32) for strength in (0, 1e9))
    assert torch.equal(plain.weight, protected.weight)


class _Quiet:
    """Avalanche's plugin, for a loop that calls two callbacks more."""

    def __init__(self, strength: float) -> None:
        self._plugin = SynapticIntelligencePlugin(si_lambda=strength)

    def __getattr__(self, name: str):
        known = ("before_training_exp", "before_training_iteration", "before_backward")
        if name in (*known, "after_training_iteration", "after_training_exp"):
            return getattr(self._plugin, name)
        return lambda strategy: None


def test_a_negative_strength_is_refused() -> None:
    with pytest.raises(ValueError, match=r"strength: got -1\.0, expected at least 0"):
        SynapticIntelligence(-1.0)
