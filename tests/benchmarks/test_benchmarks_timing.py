"""Stopwatches, on plugins that take a known time or do a known thing."""

import time

import pytest
import torch

from benchmarks.experiment import Stopwatch, time_callback

CPU = torch.device("cpu")


class Plugin:
    """Takes its time at the end of a task."""

    def after_training_exp(self, strategy: object, *, answer: int) -> int:
        time.sleep(0.02)
        return answer


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
    plugin, other, watch = Plugin(), Plugin(), Stopwatch(CPU)
    time_callback(plugin, "after_training_exp", watch)
    assert plugin.after_training_exp(None, answer=42) == 42
    assert watch.seconds >= 0.02
    seconds = watch.seconds
    other.after_training_exp(None, answer=0)
    assert watch.seconds == seconds
