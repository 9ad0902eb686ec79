"""Learning rates that change during a task."""

from math import ceil
from typing import Any

from benchmarks.avalanche_names import SupervisedPlugin


class LinearDecay(SupervisedPlugin, supports_distributed=True):  # type: ignore[misc, call-arg]
    """Lets the learning rate fall from its full size to zero, in a straight line, in every task."""

    def __init__(self) -> None:
        """Learn the full sizes when the first task begins."""
        super().__init__()
        self._full: list[float] = []
        self._steps = 1
        self._done = 0

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Begin anew."""
        if not self._full:
            self._full = [group["lr"] for group in strategy.optimizer.param_groups]
        batches = ceil(len(strategy.experience.dataset) / strategy.train_mb_size)
        self._steps, self._done = strategy.train_epochs * batches, 0

    def before_training_iteration(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Set the rate of the next step."""
        left = max(0.0, 1.0 - self._done / self._steps)
        for group, full in zip(strategy.optimizer.param_groups, self._full, strict=True):
            group["lr"] = full * left
        self._done += 1
