"""Whether a strategy shows progress bars."""

from __future__ import annotations

from typing import Any

from avalanche.logging import InteractiveLogger


def shows_progress(strategy: Any) -> bool:
    """Return whether any of a strategy's loggers is the one that draws progress bars."""
    loggers = getattr(getattr(strategy, "evaluator", None), "loggers", ())
    return any(isinstance(logger, InteractiveLogger) for logger in loggers)
