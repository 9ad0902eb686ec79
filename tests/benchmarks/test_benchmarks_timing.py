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
        self.batches: list[list[float]] = []
        self.outputs: list[list[float]] = []

    def before_backward(self, strategy) -> None:
        self.experiences.append(strategy.experience)
        self.batches.append(strategy.mbatch[0].flatten().tolist())
        self.outputs.append(strategy.mb_output.flatten().tolist())
        time.sleep(self.pause)
        if self.adds:
            strategy.loss += self.parameter**2

    def after_training_exp(self, strategy, *, answer: int) -> int:
        time.sleep(self.pause)
        return answer


EXPERIENCE = SimpleNamespace(dataset=[(torch.tensor([float(row)]), row) for row in range(5)])


def strategy_for(plugin: Plugin) -> SimpleNamespace:
    strategy = SimpleNamespace(
        device=CPU,
        optimizer=torch.optim.SGD([plugin.parameter], lr=1.0),
        train_mb_size=4,
        loss=None,
        experience=None,
    )
    strategy.forward = lambda: plugin.parameter * strategy.mbatch[0]
    return strategy


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
    milliseconds = penalty_milliseconds(plugin, strategy, EXPERIENCE)
    assert 5 <= milliseconds < 50
    assert plugin.experiences == [EXPERIENCE] * (WARM_UPS + REPETITIONS)
    assert strategy.experience is None


def test_the_penalty_sees_a_mini_batch_and_its_outputs() -> None:
    plugin = Plugin(0)
    strategy = strategy_for(plugin)
    penalty_milliseconds(plugin, strategy, EXPERIENCE)
    assert plugin.batches == [[0.0, 1.0, 2.0, 3.0]] * (WARM_UPS + REPETITIONS)
    assert plugin.outputs == [[0.0, 2.0, 4.0, 6.0]] * (WARM_UPS + REPETITIONS)
    assert strategy.mbatch is strategy.mb_output is None


def test_the_forward_pass_is_not_timed() -> None:
    plugin = Plugin(0)
    strategy = strategy_for(plugin)
    forward = strategy.forward

    def slow() -> torch.Tensor:
        time.sleep(0.005)
        return forward()

    strategy.forward = slow
    assert penalty_milliseconds(plugin, strategy, EXPERIENCE) < 5


def test_the_gradient_is_taken_and_leaves_no_trace() -> None:
    plugin = Plugin(0)
    gradients: list[float] = []
    plugin.parameter.register_hook(lambda gradient: gradients.append(gradient.item()))
    penalty_milliseconds(plugin, strategy_for(plugin), EXPERIENCE)
    assert gradients == [4.0] * (WARM_UPS + REPETITIONS)
    assert plugin.parameter.grad is None
    assert plugin.parameter.item() == 2.0


def test_no_penalty_takes_no_time() -> None:
    assert penalty_milliseconds(None, SimpleNamespace(), None) == 0.0
    idle = Plugin(0.001, adds=False)
    assert penalty_milliseconds(idle, strategy_for(idle), EXPERIENCE) == 0.0
