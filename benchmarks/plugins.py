"""Avalanche plugins that every run may have: its progress, and a learning rate that changes."""

from collections.abc import Sequence
from math import ceil
from typing import Any

from tqdm import tqdm

from benchmarks.avalanche_names import SupervisedPlugin


class Progress(SupervisedPlugin, supports_distributed=True):  # type: ignore[misc, call-arg]
    """Shows the steps of one run, over all its tasks: a bar on a terminal, lines in a log.

    Use it as a context, and as a plugin of the strategy.
    """

    def __init__(
        self, title: str, experiences: Sequence[str], steps: int, *, quiet: bool = False
    ) -> None:
        """Say what is coming.

        Args:
            title: Method and seed.
            experiences: What each experience is called, in order.
            steps: Training steps in all of them.
            quiet: Whether to show nothing.
        """
        super().__init__()
        self._title = title
        self._left = list(experiences)
        self._quiet = quiet
        # disable=None: no bar unless standard error is a terminal
        self._bar: tqdm[Any] = tqdm(total=steps, unit="step", disable=quiet or None)

    def __enter__(self) -> "Progress":
        """Show the first experience."""
        self._bar.set_description(f"{self._title}, {self._left[0]}")
        return self

    def __exit__(self, *error: object) -> None:
        """Let go of the terminal's line."""
        self._bar.close()

    def after_training_iteration(self, strategy: Any, **keywords: Any) -> None:
        """Count one step."""
        self._bar.update(1)

    def finish_experience(self, accuracy: float) -> None:
        """Report a finished experience, with the mean accuracy over the tasks learned so far."""
        text = f"average accuracy {accuracy:.2%}"
        finished = self._left.pop(0)
        if self._bar.disable and not self._quiet:
            print(f"{self._title}, {finished}: {text}", flush=True)
        self._bar.set_postfix_str(text)
        if self._left:
            self._bar.set_description(f"{self._title}, {self._left[0]}")


class Schedule(SupervisedPlugin, supports_distributed=True):  # type: ignore[misc, call-arg]
    """In every task, lets the learning rate rise from zero, and then stay or fall back to zero."""

    def __init__(self, *, decays: bool, warm_up: float) -> None:
        """Learn the full rates when the first task begins.

        Args:
            decays: Whether the rate falls, in a straight line that ends at zero.
            warm_up: Part of a task in which the rate rises, from 0 to 1.
        """
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
