"""`Ranks`: the processes of a group, which succeed together or fail together.

**No process waits for one that has failed.** All that is exchanged is exchanged after a vote: one
small `all_reduce`, in which each process says whether it is still well, and where it is. Whatever
a process raises, its next vote is that it has failed; all others raise the same at their next vote,
and nothing more is exchanged. Between votes, in work that takes long, a process looks now and then
whether another one has failed.
"""

from __future__ import annotations

import secrets
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor

from rotate_ewc._utils.validation import AUTO
from rotate_ewc._utils.warnings import add_note
from rotate_ewc.distributed.buckets import Bucket, Key, Laid, buckets, portions
from rotate_ewc.distributed.notes import default_store
from rotate_ewc.errors import NotFiniteError

# "auto", a ProcessGroup, a DeviceMesh of one dimension, or None. The classes of the last two are
# not there in every build of PyTorch.
Group = Any

_SECONDS_BETWEEN_LOOKS: Final = 0.5
# These errors are raised with the same type in all processes; others as a RuntimeError.
_KINDS: Final = {kind.__name__: kind for kind in (ValueError, TypeError, MemoryError)}
_KINDS[NotFiniteError.__name__] = NotFiniteError


class _FailedElsewhere(Exception):  # noqa: N818
    """Another process has failed; what with is told by the vote."""


class Ranks:
    """The processes of a group; one alone if there is none, for which everything here is free.

    Attributes:
        size: Number of processes.
        rank: Which of them this one is.
    """

    def __init__(self, group: Any = None) -> None:
        """Take part in a `ProcessGroup`; None is no group."""
        self._group = group
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        self._inside = False
        self._over = False
        self._failure_key = ""
        self._looked = 0.0

    @classmethod
    def of(cls, group: Group) -> Ranks:
        """Return the processes of a group as users name it.

        Args:
            group: `"auto"` (the default group, where one is initialised), a `ProcessGroup`, a
                `DeviceMesh` of one dimension, or None (this process alone).

        Raises:
            TypeError: If it is none of these.
            ValueError: If this process is not in it, or a mesh has several dimensions.
        """
        if group is None:
            return cls()
        if not dist.is_available() or isinstance(group, str):
            if group != AUTO:
                raise TypeError(_not_a_group(group))
            there = dist.is_available() and dist.is_initialized()
            return cls(dist.group.WORLD if there else None)
        if isinstance(group, dist.device_mesh.DeviceMesh):
            if group.ndim != 1:
                raise ValueError(
                    f"group is a DeviceMesh with dimensions {group.mesh_dim_names or group.ndim}; "
                    f"expected one of them, over which the data are split, such as mesh['dp']"
                )
            return cls(group.get_group())
        if group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(
                "group does not contain this process; expected one that does, or group=None"
            )
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(_not_a_group(group))
        return cls(group)

    def is_same(self, other: Ranks) -> bool:
        """Whether these are the processes of another one's group."""
        return self._group is other._group

    @contextmanager
    def together(self) -> Iterator[None]:
        """Succeed in all processes, or raise in all of them.

        Nested inside another one it does nothing. All processes of the group must enter it.

        Raises:
            Exception: What was raised inside; where that was in another process, an error of the
                same kind, or a RuntimeError, which names it.
        """
        if self.size == 1 or self._inside:
            yield
            return
        self._inside, self._over = True, False
        try:
            # A new token, so that keys of earlier failures are not taken for a failure of this run.
            token = self._vote("begin", None, secrets.randbits(62))
            self._failure_key, self._looked = f"rotate_ewc/failed/{token}", time.monotonic()
            yield
            with uninterrupted():
                self._vote("end", None)
        except BaseException as error:
            self._fail(error)
            raise
        finally:
            self._inside = False

    def look(self) -> None:
        """Raise if another process has failed; to be called now and then in work that takes long.

        Whatever is raised must go through to the end of `together`.
        """
        if self.size == 1 or time.monotonic() - self._looked < _SECONDS_BETWEEN_LOOKS:
            return
        self._looked = time.monotonic()
        store = default_store()
        if store is not None and store.check([self._failure_key]):
            raise _FailedElsewhere

    def gather(self, place: str, value: Any) -> list[Any]:
        """Return what every process has, by rank.

        Args:
            place: What is exchanged, the same in all processes.
            value: Something small that can be pickled.
        """
        if self.size == 1:
            return [value]
        with uninterrupted():
            self._vote(place, None)
            return self._gathered(value)

    def sum(self, place: str, tensors: Sequence[Tensor]) -> None:
        """Sum tensors over all processes, in place; all get the same bits.

        Args:
            place: What is summed.
            tensors: Of the same shapes and dtypes, in the same order, in all processes.
        """
        if self.size > 1:
            for bucket in buckets([(tensor, 0) for tensor in tensors]):
                with self._exchanging(place, bucket):
                    dist.all_reduce(bucket.flat, group=self._group)

    def reduce(self, place: str, tensors: Sequence[tuple[Tensor, int]]) -> None:
        """Sum tensors over all processes, in place, at their owners; elsewhere they are garbage.

        Args:
            place: What is summed.
            tensors: Tensors and the ranks of their owners, in the same order everywhere.
        """
        if self.size > 1:
            for bucket in buckets(tensors):
                with self._exchanging(place, bucket):
                    dist.reduce(bucket.flat, self._global(bucket.owner), group=self._group)

    def share(
        self, place: str, own: Mapping[Key, Mapping[str, Tensor]], device: torch.device
    ) -> dict[Key, dict[str, Tensor]]:
        """Return the tensors of all processes by their keys: everywhere the same bits and layouts.

        Args:
            place: What is shared.
            own: Named tensors of this process by keys, which no other process has.
            device: The device for the tensors of other processes.
        """
        return dict(self.stream(place, own, device))

    def stream(
        self, place: str, own: Mapping[Key, Mapping[str, Tensor]], device: torch.device
    ) -> Iterator[tuple[Key, dict[str, Tensor]]]:
        """Yield what `share` returns piece by piece, for callers that do not keep all of it.

        All processes must take all pieces. Pieces of other processes arrive up to 32 MiB at a time.

        Args:
            place: What is shared.
            own: Named tensors of this process by keys, which no other process has.
            device: Where tensors of others are to be.
        """
        if self.size == 1:
            for key, tensors in own.items():
                yield key, dict(tensors)
            return
        kept = {key: {n: Laid.of(t) for n, t in tensors.items()} for key, tensors in own.items()}
        for rank, described in enumerate(self._described(place, kept)):
            for portion in portions(described):
                laids = {
                    key: kept[key]
                    if rank == self.rank
                    else {name: Laid.empty(one, device) for name, one in named.items()}
                    for key, named in portion
                }
                wires = [(laid.wire, rank) for named in laids.values() for laid in named.values()]
                for bucket in buckets(wires):
                    with self._exchanging(place, bucket):
                        dist.broadcast(bucket.flat, self._global(bucket.owner), group=self._group)
                for key, named in laids.items():
                    yield key, {name: laid.tensor for name, laid in named.items()}

    def outline(
        self, place: str, own: Mapping[Key, Mapping[str, Tensor]]
    ) -> dict[Key, dict[str, Tensor]]:
        """Return this process's own tensors, and meta tensors with the shapes of all others'.

        Args:
            place: What is described.
            own: Named tensors of this process by keys, which no other process has.
        """
        found = {key: dict(tensors) for key, tensors in own.items()}
        if self.size == 1:
            return found
        kept = {key: {n: Laid.of(t) for n, t in tensors.items()} for key, tensors in own.items()}
        meta = torch.device("meta")
        for rank, described in enumerate(self._described(place, kept)):
            if rank != self.rank:
                for key, named in described:
                    found[key] = {n: Laid.empty(one, meta).tensor for n, one in named.items()}
        return found

    def total(self, place: str, numbers: Sequence[float]) -> list[float]:
        """Return the sums of numbers over all processes, the same bits in all.

        Args:
            place: What is summed.
            numbers: As many in all processes.
        """
        if self.size == 1:
            return list(numbers)
        sums = torch.tensor(list(numbers), dtype=torch.float64, device=self._device)
        self.sum(place, [sums])
        return sums.tolist()

    def _described(
        self, place: str, kept: Mapping[Key, Mapping[str, Laid]]
    ) -> list[list[tuple[Key, dict[str, Any]]]]:
        """Return, by rank, the keys of all processes and what their tensors look like."""
        own = [(key, {n: laid.told for n, laid in laids.items()}) for key, laids in kept.items()]
        return self.gather(f"{place}, shapes", own)

    def owners(self, costs: Sequence[float], busy: Sequence[float] | None = None) -> list[int]:
        """Assign tasks to processes: the largest first, each to the one with the least work.

        Args:
            costs: Those of the tasks.
            busy: What each process has to do already; None is nothing.
        """
        busy = [0.0] * self.size if busy is None else list(busy)
        owners = [0] * len(costs)
        for index in sorted(range(len(costs)), key=lambda i: -costs[i]):
            owners[index] = busy.index(min(busy))
            busy[owners[index]] += costs[index]
        return owners

    def check_same(self, values: Mapping[str, Any]) -> None:
        """Raise `ValueError` unless all processes have the same values, naming those that differ.

        Args:
            values: By names for messages; something that can be pickled and compared.
        """
        told = self.gather("arguments", dict(values))
        for rank, others in enumerate(told[1:], 1):
            for name in {**told[0], **others}:
                first, other = told[0].get(name), others.get(name)
                if first != other:
                    raise ValueError(
                        f"{name} is {first!r} on rank 0, but {other!r} on rank {rank}; expected "
                        f"the same on all ranks of the group (or group=None, for each rank alone)"
                    )

    def _global(self, rank: int) -> int:
        return int(dist.get_global_rank(self._group, rank))

    @contextmanager
    def _exchanging(self, place: str, bucket: Bucket) -> Iterator[None]:
        """Vote, exchange a bucket, and copy the result into its tensors."""
        with uninterrupted():
            self._vote(place, None)
            yield
            bucket.unpack()

    def _vote(self, place: str, error: BaseException | None, token: int = 0) -> int:
        """Wait for all processes; raise if one has failed, or is at another place.

        Args:
            place: Where this one is.
            error: Why it has failed.
            token: Of all processes', the largest is returned.
        """
        code = crc32(place.encode())
        votes = torch.tensor([int(error is not None), code, -code, token], device=self._device)
        dist.all_reduce(votes, dist.ReduceOp.MAX, group=self._group)
        failed, largest, smallest, token = map(int, votes.tolist())
        if failed:
            self._over = True
            told = None if error is None else (type(error).__name__, str(error))
            everywhere = self._gathered(told)
            if error is None:
                raise _raised_elsewhere(everywhere)
        elif largest != -smallest:
            self._over = True
            places = self._gathered(place)
            raise RuntimeError(
                f"the ranks are at different points of the program: "
                f"{', '.join(f'rank {r} at {p!r}' for r, p in enumerate(places))}; expected the "
                f"same calls, in the same order, on all ranks of the group"
            )
        return token

    def _fail(self, error: BaseException) -> None:
        """Report an error to all other processes, or raise theirs if it comes from them."""
        if self._over:
            return
        self._over = True
        elsewhere = isinstance(error, _FailedElsewhere)
        store = default_store()
        with uninterrupted():
            if store is not None and not elsewhere:
                # Without it they hear of it a little later.
                with suppress(RuntimeError, ValueError):
                    store.set(self._failure_key, b"1")
            try:
                self._vote("failed", None if elsewhere else error)
            except RuntimeError as broken:
                if elsewhere:
                    raise
                add_note(error, f"the other ranks could not be told of it: {broken}")

    def _gathered(self, value: Any) -> list[Any]:
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self._group)
        return found

    @property
    def _device(self) -> torch.device:
        """Where the group can exchange numbers."""
        if dist.get_backend(self._group) == "nccl":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let Ctrl-C wait, so that no process leaves a joint operation half done."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or handler is None:
        yield
        return
    received: list[tuple[Any, ...]] = []
    signal.signal(signal.SIGINT, lambda *arguments: received.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if received and callable(handler):
            handler(*received[0])


def _raised_elsewhere(told: Sequence[tuple[str, str] | None]) -> Exception:
    """Return the error to raise when another process has failed."""
    rank, (name, message) = next((r, one) for r, one in enumerate(told) if one is not None)
    if name in _KINDS:
        return _KINDS[name](f"on rank {rank}: {message}")
    return RuntimeError(f"rank {rank} has failed with {name}: {message}")


def _not_a_group(group: object) -> str:
    return (
        f"group is {group!r}; expected 'auto', a torch.distributed.ProcessGroup, a DeviceMesh of "
        f"one dimension, or None"
    )
