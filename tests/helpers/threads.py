"""Processes that are played by threads: what they exchange is handed over, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from queue import Queue
from typing import Any, TypeVar

import torch
from torch import Tensor

from rotate_ewc.distributed.buckets import Key
from rotate_ewc.distributed.processes import Ranks

Result = TypeVar("Result")
SECONDS = 30.0


class OtherHasFailed(Exception):  # noqa: N818
    """What is raised by those that wait for a process that has failed."""


class ThreadRanks(Ranks):
    """One of several processes, each of which is a thread of this one.

    Attributes:
        told: What this one has given to all others, and where.
        devices: Where it wanted what others gave.
    """

    def __init__(self, rank: int, letters: list[list[Queue[Any]]]) -> None:
        """Take part.

        Args:
            rank: Which one this is.
            letters: What each process has for each other one, in order.
        """
        super().__init__()
        self.rank, self.size = rank, len(letters)
        self._letters = letters
        self.told: list[tuple[str, Any]] = []
        self.devices: set[torch.device] = set()

    def gather(self, place: str, value: Any) -> list[Any]:
        self.told.append((place, value))
        self.tell((place, value))
        found = [letters[self.rank].get(timeout=SECONDS) for letters in self._letters]
        if None in found:
            raise OtherHasFailed
        assert {there for there, _ in found} == {place}
        return [told for _, told in found]

    def tell(self, letter: tuple[str, Any] | None) -> None:
        """Give all processes the same; None is that this one has failed."""
        for letters in self._letters[self.rank]:
            letters.put(letter)

    def stream(
        self, place: str, own: Mapping[Key, Mapping[str, Tensor]], device: torch.device
    ) -> Iterator[tuple[Key, dict[str, Tensor]]]:
        self.devices.add(device)
        for rank, kept in enumerate(self.gather(place, own)):
            for key, named in kept.items():
                if rank == self.rank:
                    yield key, dict(named)
                else:
                    yield key, {name: t.to(device, copy=True) for name, t in named.items()}

    def together(self) -> AbstractContextManager[None]:
        return nullcontext()


def in_threads(size: int, body: Callable[[ThreadRanks], Result]) -> list[Result | Exception]:
    """What a function returns or raises in each of several processes, by rank."""
    letters: list[list[Queue[Any]]] = [[Queue() for _ in range(size)] for _ in range(size)]

    def run(rank: int) -> Result | Exception:
        ranks = ThreadRanks(rank, letters)
        try:
            return body(ranks)
        except Exception as error:
            ranks.tell(None)
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))
