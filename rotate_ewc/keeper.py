"""Observations kept from the first pass over the data for the second, as many as fit in memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from rotate_ewc.observation import Observation


class Keeper:
    """Keeps the observations of the first batches, of whole ones, until there is no more room."""

    def __init__(self, max_bytes: int) -> None:
        """Keep nothing yet.

        Args:
            max_bytes: What all that is kept may take.
        """
        self._max_bytes = max_bytes
        self._kept: deque[Observation] = deque()
        # Memory by address, since observations may be views of the same.
        self._storages: dict[int, int] = {}
        self._full = False

    def offer(self, observation: Observation) -> None:
        """Keep an observation, if all before it are kept and it fits."""
        if self._full:
            return
        self._kept.append(observation)
        self._storages.update(observation.storages)
        if sum(self._storages.values()) > self._max_bytes:
            self._full = True
            while self._kept and self._kept[-1].batch == observation.batch:
                self._kept.pop()

    def take(self) -> Iterator[Observation]:
        """Give away what is kept, in order; nothing if it is not what it was.

        The latter is so for a loader that fills the same buffer for every batch: the layers' inputs
        that were kept are then no longer those of their batches.
        """
        if not all(use.unmodified for kept in self._kept for use in kept.uses):
            self._full = True
            self._kept.clear()
        while self._kept:
            yield self._kept.popleft()

    @property
    def complete(self) -> bool:
        """Whether all that was offered was kept."""
        return not self._full
