"""Stopwatches, on plugins that take a known time or do a known thing."""

import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks.timing import (
    REPETITIONS,
    WARM_UPS,
    Stopwatch,
    penalty_milliseconds,
    time_callback,
)

CPU = torch.device("cpu")


class Plugin:
    """Adds a penalty on one parameter, slowly."""

    def __init__(self, pause: float, adds: bool = True) -> None:
        self.parameter = torch.nn.Parameter(torch.tensor([2.0]))
        self.pause = pause
        self.adds = adds
        self.experiences: list[object] = []

    def before_backward(self, strategy) -> None:
        self.experiences.append(strategy.experience)
        time.sleep(self.pause)
        if self.adds:
            strategy.loss += self.parameter**2

    def after_training_exp(self, strategy, *, answer: int) -> int:
        time.sleep(self.pause)
        return answer


def strategy_for(plugin: Plugin) -> SimpleNamespace:
    optimizer = torch.optim.SGD([plugin.parameter], lr=1.0)
    return SimpleNamespace(device=CPU, optimizer=optimizer, loss=None, experience=None)


def test_a_stopwatch_adds_up() -> None:
    watch = Stopwatch(CPU)
    for _ in range(2):
        with watch:
            time.sleep(0.02)
    assert 0.04 <= watch.seconds < 0.4


def test_a_stopwatch_counts_what_failed() -> None:
    def fail() -> None:
        with watch:
            time.sleep(0.02)
            raise RuntimeError("failed")

    watch = Stopwatch(CPU)
    with pytest.raises(RuntimeError, match="failed"):
        fail()
    assert watch.seconds >= 0.02


def test_a_timed_callback_does_what_it_did() -> None:
    plugin, other, watch = Plugin(0.02), Plugin(0.02), Stopwatch(CPU)
    time_callback(plugin, "after_training_exp", watch)
    assert plugin.after_training_exp(None, answer=42) == 42
    assert watch.seconds >= 0.02
    seconds = watch.seconds
    other.after_training_exp(None, answer=0)
    assert watch.seconds == seconds


def test_the_penalty_is_timed_with_the_last_experience() -> None:
    plugin = Plugin(0.005)
    strategy = strategy_for(plugin)
    milliseconds = penalty_milliseconds(plugin, strategy, "experience")
    assert 5 <= milliseconds < 50
    assert plugin.experiences == ["experience"] * (WARM_UPS + REPETITIONS)
    assert strategy.experience is None


def test_the_gradient_is_taken_and_leaves_no_trace() -> None:
    plugin = Plugin(0)
    gradients: list[float] = []
    plugin.parameter.register_hook(lambda gradient: gradients.append(gradient.item()))
    penalty_milliseconds(plugin, strategy_for(plugin), None)
    assert gradients == [4.0] * (WARM_UPS + REPETITIONS)
    assert plugin.parameter.grad is None
    assert plugin.parameter.item() == 2.0


def test_no_penalty_takes_no_time() -> None:
    assert penalty_milliseconds(None, SimpleNamespace(), None) == 0.0
    idle = Plugin(0.001, adds=False)
    assert penalty_milliseconds(idle, strategy_for(idle), None) == 0.0
