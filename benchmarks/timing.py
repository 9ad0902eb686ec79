"""How long things take, measured from outside."""

import functools
import time
from typing import Any

import torch


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
