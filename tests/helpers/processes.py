"""Tests that run in several processes at once, which talk to each other.

Importing torch takes seconds, so the processes are started once and run many tests. Every test has
a time after which its processes are killed, so that none can hang.
"""

from __future__ import annotations

import atexit
import importlib
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from datetime import timedelta
from itertools import count
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any, Final

import pytest
import torch
import torch.distributed as dist

from rotate_ewc._utils.tree import map_tensors

SECONDS: Final = 60.0
_NUMBERS: Final = count()
_CONTEXT: Final = get_context("forkserver")
# Imported once, by the process of which all others are copies.
_CONTEXT.set_forkserver_preload(
    [
        "tests.helpers.processes",
        "rotate_ewc",
        "tests.helpers.cases",
        "torch.distributed.checkpoint",
        "torch.distributed.fsdp",
        "torch._dynamo",  # which optimizers import when they are first used
    ]
)


def distributed_test(
    world_size: Sequence[int],
    *,
    seconds: float = SECONDS,
    killed: Collection[int] = (),
    backends: Sequence[str] = ("gloo", "nccl"),
) -> Callable[[Callable[[], None]], Callable[..., None]]:
    """Run the function in so many processes at once, of which each one has a rank.

    Args:
        world_size: Numbers of processes, each a test of its own.
        seconds: How long they may take.
        killed: Ranks of processes that end in the middle of it.
        backends: Those of `torch.distributed`; NCCL is for machines with as many GPUs.
    """

    def decorate(body: Callable[[], None]) -> Callable[..., None]:
        def test(size: int, backend: str) -> None:
            _run(body, size, backend, seconds, killed)

        test.__name__, test.__doc__, test.__module__ = body.__name__, body.__doc__, body.__module__
        test.body = body  # type: ignore[attr-defined]
        kinds = [
            pytest.param(size, backend, marks=_marks(size, backend), id=f"{backend}-{size}")
            for backend in backends
            for size in world_size
        ]
        return pytest.mark.parametrize(("size", "backend"), kinds)(test)

    return decorate


def here(value: Any) -> Any:
    """Move tensors, or a module, to the device of this process: a GPU with NCCL."""
    if dist.get_backend() != "nccl":
        return value
    device = torch.device("cuda", dist.get_rank())
    return value.to(device) if hasattr(value, "to") else map_tensors(lambda t: t.to(device), value)


def gather(value: Any) -> list[Any]:
    """What every process has, by rank."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def _marks(size: int, backend: str) -> list[Any]:
    marks: list[Any] = [pytest.mark.distributed]
    if backend == "nccl":
        enough = dist.is_nccl_available() and torch.cuda.device_count() >= size
        marks += [
            pytest.mark.gpu,
            pytest.mark.skipif(not enough, reason=f"needs NCCL and {size} GPUs"),
        ]
    else:
        marks.append(pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo"))
    return marks


class _Worker:
    """One process, which runs what it is told to."""

    def __init__(self, rank: int) -> None:
        self.connection, theirs = _CONTEXT.Pipe()
        self.process = _CONTEXT.Process(target=_work, args=(rank, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def kill(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.join()


_WORKERS: Final[dict[int, _Worker]] = {}


@atexit.register
def _kill_all() -> None:
    for rank in list(_WORKERS):
        _WORKERS.pop(rank).kill()


def _run(
    body: Callable[[], None], size: int, backend: str, seconds: float, killed: Collection[int]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder, f"store{next(_NUMBERS)}"))
        for rank in range(size):
            if rank not in _WORKERS:
                _WORKERS[rank] = _Worker(rank)
            _WORKERS[rank].connection.send((body.__module__, body.__name__, size, backend, store))
        told = _answers(size, time.monotonic() + seconds)
        late = [rank for rank in range(size) if rank not in told]
        for rank in range(size):
            # Those that hang, and those that were killed, are started again.
            if told.get(rank, "killed") == "killed":
                _WORKERS.pop(rank).kill()
        failed = {r: t for r, t in told.items() if t and not (t == "killed" and r in killed)}
        assert not failed, "\n".join(f"rank {rank}: {text}" for rank, text in failed.items())
        assert not late, f"ranks {late} were still at work after {seconds} seconds"
        assert {r for r, t in told.items() if t == "killed"} == set(killed)


def _answers(size: int, deadline: float) -> dict[int, str]:
    """What each process says when it is done: nothing, its error, or that it was killed."""
    told: dict[int, str] = {}
    waiting = {_WORKERS[rank].connection: rank for rank in range(size)}
    while waiting and time.monotonic() < deadline:
        for ready in connection.wait(list(waiting), max(0.0, deadline - time.monotonic())):
            rank = waiting.pop(ready)  # type: ignore[arg-type]
            try:
                told[rank] = ready.recv()  # type: ignore[union-attr]
            except EOFError:
                told[rank] = "killed"
    return told


def _work(rank: int, parent: Any) -> None:
    torch.set_num_threads(1)
    with suppress(EOFError, KeyboardInterrupt):
        while True:
            parent.send(_tried(rank, *parent.recv()))


def _tried(rank: int, module: str, name: str, size: int, backend: str, store: str) -> str:
    """Run a test in this process, and return its error."""
    try:
        # Before there is a group, as programs import what they need.
        body = getattr(importlib.import_module(module), name).body
        dist.init_process_group(
            backend,
            init_method=f"file://{store}",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=30),
        )
        body()
    except BaseException:
        return traceback.format_exc()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return ""


def end_this_process() -> None:
    """End, as a process does that is killed."""
    os._exit(1)
