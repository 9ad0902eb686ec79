"""Notes that processes leave for each other, in the store of their default group."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch.distributed as dist


class Notes:
    """Notes that the processes of the default group leave for each other, without waiting.

    Attributes:
        size: Number of processes.
        rank: Which of them this one is.
    """

    def __init__(self, store: Any) -> None:
        """Keep them in a store."""
        self._store = store
        self.size, self.rank = dist.get_world_size(), dist.get_rank()

    @classmethod
    def of_default_group(cls) -> Notes | None:
        """Return the place for notes; None without other processes."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return None
        store = default_store()
        return None if store is None else cls(store)

    def leave(self, key: str, text: str) -> None:
        """Leave a note, if the others can still be reached."""
        with suppress(RuntimeError):
            self._store.set(key, text)

    def has(self, keys: Sequence[str]) -> bool:
        """Whether there are all of some notes."""
        try:
            return bool(self._store.check(list(keys)))
        except RuntimeError:
            return False

    def read(self, key: str) -> str:
        """Return a note that is there."""
        return bytes(self._store.get(key)).decode()


def default_store() -> Any:
    """Return where processes can leave notes for each other; None if there is no such place."""
    try:
        return dist.distributed_c10d._get_default_store()
    except (AttributeError, RuntimeError, ValueError):
        return None
