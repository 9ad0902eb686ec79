"""Observations kept from the first pass over the data for the second, as many as fit in memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

from rotate_ewc._utils.tree import same
from rotate_ewc.estimation.captured_batch import Observation


class Keeper:
    """Keeps the observations of the first batches, of whole ones, until there is no more room.

    Not all loaders give the same batches twice: they may shuffle, change the inputs at random, or
    fill the same buffer for every batch. What is kept counts only for a batch that is the same.
    """

    def __init__(self, max_bytes: int) -> None:
        """Keep nothing yet.

        Args:
            max_bytes: What all that is kept may take.
        """
        self._max_bytes = max_bytes
        self._kept: deque[Observation] = deque()
        # Addresses of memory that counts already, since observations may be views of the same.
        self._addresses: set[int] = set()
        self._num_bytes = 0
        self._full = False

    def offer(self, observation: Observation) -> None:
        """Keep an observation, if all before it are kept and it fits."""
        if self._full:
            return
        self._kept.append(observation)
        storages = observation.storages
        self._num_bytes += sum(storages[address] for address in storages.keys() - self._addresses)
        self._addresses |= storages.keys()
        if self._num_bytes > self._max_bytes:
            self._full = True
            while self._kept and self._kept[-1].batch == observation.batch:
                self._kept.pop()

    def take_all(self) -> Iterator[Observation] | None:
        """Return all observations, or None if not all were kept, or are what they were."""
        if self._full or not all(observation.unmodified for observation in self._kept):
            return None
        return self._emptied()

    def take(self, batch: int, inputs: Any, targets: Any) -> list[Observation]:
        """Give away the observations of a batch; none if another one is given than was kept.

        Batches must be asked for in order. After one for which there is nothing, nothing is kept.
        """
        found = []
        while self._kept and self._kept[0].batch == batch:
            found.append(self._kept.popleft())
        if not all(o.unmodified and same(o.given, (inputs, targets)) for o in found):
            found = []
        if not found:
            self._kept.clear()
        return found

    def _emptied(self) -> Iterator[Observation]:
        while self._kept:
            yield self._kept.popleft()
