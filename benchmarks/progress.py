"""Progress of a run: a bar on a terminal, a line per task in a log."""

from collections.abc import Sequence
from types import TracebackType
from typing import Any

from tqdm import tqdm

from benchmarks.avalanche_names import SupervisedPlugin


class ProgressPlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[misc, call-arg]
    """Shows the steps of one run, over all its tasks.

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
        self._experiences = experiences
        self._finished = 0
        self._quiet = quiet
        # disable=None: no bar unless standard error is a terminal
        self._bar: tqdm[Any] = tqdm(total=steps, unit="step", disable=quiet or None)

    def __enter__(self) -> "ProgressPlugin":
        """Show the first experience."""
        self._describe()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Let go of the terminal's line."""
        self._bar.close()

    def after_training_iteration(self, strategy: Any, **keywords: Any) -> None:
        """Count one step."""
        self._bar.update(1)

    def finish_experience(self, accuracy: float) -> None:
        """Report a finished experience.

        Args:
            accuracy: Mean accuracy over the tasks learned so far, a fraction.
        """
        text = f"average accuracy {accuracy:.2%}"
        if self._bar.disable and not self._quiet:
            print(f"{self._title}, {self._experiences[self._finished]}: {text}", flush=True)
        self._bar.set_postfix_str(text)
        self._finished += 1
        if self._finished < len(self._experiences):
            self._describe()

    def _describe(self) -> None:
        """Name the experience under way on the bar."""
        self._bar.set_description(f"{self._title}, {self._experiences[self._finished]}")
