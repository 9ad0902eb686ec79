"""How long things take, measured from outside."""

import functools
import statistics
import time
from typing import Any

import torch
from torch.utils.data import DataLoader

WARM_UPS = 3
REPETITIONS = 20


class Stopwatch:
    """Adds up the wall time of ``with`` blocks, work queued on an accelerator included."""

    def __init__(self, device: torch.device) -> None:
        """Start at zero; the queued work of the device counts."""
        self.seconds = 0.0
        self._device = device
        self._start = 0.0

    def __enter__(self) -> "Stopwatch":
        """Start."""
        self._synchronise()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        """Stop."""
        self._synchronise()
        self.seconds += time.perf_counter() - self._start

    def _synchronise(self) -> None:
        """Wait for what has been queued; the CPU queues nothing."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        elif self._device.type == "mps":
            torch.mps.synchronize()


def time_callback(plugin: Any, callback: str, stopwatch: Stopwatch) -> None:
    """Have a stopwatch run whenever a callback of this one Avalanche plugin is called."""
    original = getattr(plugin, callback)

    @functools.wraps(original)
    def timed(*arguments: Any, **keywords: Any) -> Any:
        with stopwatch:
            return original(*arguments, **keywords)

    setattr(plugin, callback, timed)


def penalty_milliseconds(plugin: Any | None, strategy: Any, experience: Any) -> float:
    """Median time of a penalty's value and gradient, as a training step after all tasks pays it.

    It is what ``before_backward`` of a plugin adds to the loss of a trained strategy, which is told
    that it trains on an experience; 0 without a plugin, and where the plugin adds nothing.
    """
    if plugin is None:
        return 0.0
    # Strategies forget their experience after training, but a penalty may weigh past tasks
    # by the size of the present one, or look at the mini-batch.
    strategy.experience = experience
    loader = DataLoader(experience.dataset, batch_size=strategy.train_mb_size)
    strategy.mbatch = [tensor.to(strategy.device) for tensor in next(iter(loader))]
    durations = [_penalty_seconds(plugin, strategy) for _ in range(WARM_UPS + REPETITIONS)]
    strategy.experience = strategy.mbatch = strategy.mb_output = None
    strategy.loss = torch.zeros(1)
    return 1_000 * statistics.median(durations[WARM_UPS:])


def _penalty_seconds(plugin: Any, strategy: Any) -> float:
    """Wall time of one evaluation of a penalty and its gradient."""
    strategy.mb_output = strategy.forward()
    strategy.loss = torch.ones(1, device=strategy.device)
    stopwatch = Stopwatch(strategy.device)
    with stopwatch:
        plugin.before_backward(strategy)
        adds_something = strategy.loss.requires_grad
        if adds_something:
            strategy.loss.backward()
    strategy.optimizer.zero_grad()
    return stopwatch.seconds if adds_something else 0.0
