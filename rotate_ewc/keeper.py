"""Observations kept from the first pass over the data for the second, while they fit in memory."""

from __future__ import annotations

from rotate_ewc.observation import Observation


class Keeper:
    """Keeps all observations or none.

    As soon as two batches show how much each takes, it is foreseen whether all will fit: what would
    be thrown away in the end need not be kept until then.
    """

    def __init__(self, max_bytes: int, num_batches: int | None) -> None:
        """Keep nothing yet.

        Args:
            max_bytes: What all observations may take.
            num_batches: Number of batches to come; None where it is not known.
        """
        self._max_bytes = max_bytes
        self._num_batches = num_batches
        self._kept: list[Observation] = []
        # Memory by address, since observations may be views of the same.
        self._storages: dict[int, int] = {}
        self._bytes_after_batch: list[int] = []
        self._full = False

    def offer(self, observation: Observation) -> None:
        """Keep an observation, if all so far are kept and this and later ones will fit."""
        if self._full:
            return
        if observation.first and self._kept:
            self._bytes_after_batch.append(self._num_bytes)
        self._kept.append(observation)
        self._storages.update(observation.storages)
        if max(self._num_bytes, self._foreseen_bytes()) > self._max_bytes:
            self._full = True
            self._kept.clear()
            self._storages.clear()

    def intact(self) -> list[Observation]:
        """Return all observations; none if they did not fit, or are not what they were.

        The latter is so for a loader that fills the same buffer for every batch: the layers' inputs
        that were kept are then no longer those of their batches.
        """
        unmodified = all(use.unmodified for kept in self._kept for use in kept.uses)
        return self._kept if unmodified else []

    @property
    def _num_bytes(self) -> int:
        return sum(self._storages.values())

    def _foreseen_bytes(self) -> int:
        """Return what all batches will take, if those to come grow like the second."""
        if self._num_batches is None or len(self._bytes_after_batch) < 2:
            return 0
        first, second = self._bytes_after_batch[:2]
        return second + (self._num_batches - 2) * (second - first)
