"""Learning rates that change during a task."""

from math import ceil
from typing import Any

from benchmarks.avalanche_names import SupervisedPlugin


class Schedule(SupervisedPlugin, supports_distributed=True):  # type: ignore[misc, call-arg]
    """In every task, lets the learning rate rise from zero, and then stay or fall back to zero."""

    def __init__(self, *, decays: bool, warm_up: float) -> None:
        """Fall in a straight line or not, and rise for a part of each task, from 0 to 1."""
        super().__init__()
        self._decays = decays
        self._warm_up = warm_up
        self._full: list[float] = []
        self._steps = 1
        self._done = 0

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Start a task."""
        if not self._full:
            self._full = [group["lr"] for group in strategy.optimizer.param_groups]
        batches = ceil(len(strategy.experience.dataset) / strategy.train_mb_size)
        self._steps, self._done = strategy.train_epochs * batches, 0

    def before_training_iteration(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Set the rate of the next step."""
        scale = self.scale(self._done / self._steps)
        for group, full in zip(strategy.optimizer.param_groups, self._full, strict=True):
            group["lr"] = full * scale
        self._done += 1

    def scale(self, progress: float) -> float:
        """Return what the full rate is multiplied with, at some part of a task."""
        falling = max(0.0, 1.0 - progress) if self._decays else 1.0
        rising = min(1.0, progress / self._warm_up) if self._warm_up else 1.0
        return falling * rising
