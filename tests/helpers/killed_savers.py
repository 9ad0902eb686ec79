"""A process whose children save, and are killed; it has imported torch once for all of them.

Run as `python -m tests.helpers.killed_savers FOLDER EXPERIMENT:NUMBER …`; prints results as JSON.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch

from rotate_ewc import EKFACLinearOperator
from rotate_ewc.io import files
from rotate_ewc.provenance import Provenance
from tests.helpers.honest_snapshots import digest_of, random_block

SIZE: Final = 500
# Before the first moment at which there is anything to see, and after the last.
STAGES: Final = (
    "before writing",
    "written in part",
    "before the file is on the disk",
    "before it is renamed",
    "before the folder is on the disk",
)


def large(seed: int) -> EKFACLinearOperator:
    """Some 3 MB: a save takes milliseconds."""
    block = random_block(("w",), (1, SIZE, SIZE), seed=seed)
    provenance = Provenance("MSELoss", "mean", "type2", 10, 20.0)
    return EKFACLinearOperator.from_blocks([block], {"w": (SIZE, SIZE)}, provenance)


def child(work: Callable[[], Any]) -> int:
    """Do something in a child; return its id."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)  # noqa: T201
        finally:
            os._exit(status)
    return pid


def ended_by_signal(pid: int) -> bool:
    """Wait for a child; whether a signal ended it. Another failure is raised."""
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        return True
    if os.WEXITSTATUS(status):
        raise RuntimeError(f"a child has failed with {os.WEXITSTATUS(status)}")
    return False


def leftovers(folder: Path) -> list[Path]:
    """Files of unfinished saves."""
    return [path for path in folder.iterdir() if path.name.startswith(".")]


class Target:
    """A file that two operators are saved to in turn."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "target"
        self.operators = (large(1), large(2))
        self.digests = tuple(map(digest_of, self.operators))
        self.operators[0].save(self.path)
        self.now = 0

    def save_other(self) -> None:
        self.operators[1 - self.now].save(self.path)

    def look(self) -> str:
        """Load the file, which has to be one or the other, and sweep up; say which it is."""
        found = self.digests.index(digest_of(EKFACLinearOperator.load(self.path)))
        result = "old" if found == self.now else "new"
        self.now = found
        for path in leftovers(self.folder):
            path.unlink()
        return result


def at_random_moments(folder: Path, number: int) -> dict[str, Any]:
    """Kill savers at moments that are spread over the time that a save takes.

    How long that is depends on the machine, so it goes on until enough of them have met each fate.
    """
    target, rng = Target(folder), random.Random(11)
    found = Counter(killed=0, leftovers=0, old=0, new=0)
    span = 0.1
    for trial in range(10 * number):
        if trial >= number and min(found.values()) >= number / 4:
            break
        pid = child(target.save_other)
        time.sleep(span * rng.random())
        os.kill(pid, signal.SIGKILL)
        killed = ended_by_signal(pid)
        # Half of the children are to live, however long a save takes.
        span *= 1.25 if killed else 0.8
        found["killed"] += killed
        found["leftovers"] += len(leftovers(folder))
        found[target.look()] += 1
    return dict(found)


def at_every_stage(folder: Path, number: int) -> dict[str, Any]:
    """Kill savers, by their own hands, at the moments that matter."""
    target = Target(folder)
    found = {}
    for stage in STAGES:
        assert ended_by_signal(child(lambda stage=stage: _save_up_to(stage, target)))  # type: ignore[misc]
        left = len(leftovers(folder))
        found[stage] = [target.look(), left]
    return found


def _save_up_to(stage: str, target: Target) -> None:
    def die(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def die_at_second(*_: Any, calls: list[int] = []) -> None:  # noqa: B006
        calls.append(1)
        if len(calls) == 2:
            die()

    def write_in_part(tensors: Any, path: Path, **_: Any) -> None:
        Path(path).write_bytes(target.path.read_bytes()[: SIZE * SIZE])
        die()

    places: dict[str, tuple[Any, str, Callable[..., Any]]] = {
        "before writing": (files, "save_file", die),
        "written in part": (files, "save_file", write_in_part),
        "before the file is on the disk": (os, "fsync", die),
        "before it is renamed": (os, "replace", die),
        "before the folder is on the disk": (os, "fsync", die_at_second),
    }
    owner, name, function = places[stage]
    setattr(owner, name, function)
    target.save_other()


def on_a_full_disk(folder: Path, number: int) -> dict[str, Any]:
    """Let files be no larger than a part of a snapshot."""
    target = Target(folder)

    def save() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (number, number))
        try:
            target.save_other()
        except OSError as error:
            os.write(writing, repr(error).encode())

    reading, writing = os.pipe()
    ended_by_signal(child(save))
    os.close(writing)
    error = os.read(reading, 10_000).decode()
    return {"error": error, "leftovers": len(leftovers(folder)), "found": target.look()}


def in_a_locked_folder(folder: Path, number: int) -> dict[str, Any]:
    """Save as a user who may read everything, and write nothing."""
    target = Target(folder)
    folder.chmod(0o555)

    def save() -> None:
        if os.getuid() == 0:
            os.setuid(65534)
        try:
            target.save_other()
        except PermissionError as error:
            os.write(writing, repr(error).encode())

    reading, writing = os.pipe()
    ended_by_signal(child(save))
    os.close(writing)
    error = os.read(reading, 10_000).decode()
    folder.chmod(0o755)
    return {"error": error, "leftovers": len(leftovers(folder)), "found": target.look()}


def at_once(folder: Path, number: int) -> dict[str, Any]:
    """Let four save to one file while it is read again and again."""
    operators = [large(seed) for seed in range(4)]
    digests = list(map(digest_of, operators))
    path, stop = folder / "target", folder / "stop"
    operators[0].save(path)

    def save(own: EKFACLinearOperator) -> None:
        while not stop.exists():
            own.save(path)

    savers = [child(lambda own=own: save(own)) for own in operators]  # type: ignore[misc]
    seen: Counter[int] = Counter()
    try:
        # Each time, one of the four is found.
        while sum(seen.values()) < number or (len(seen) < 3 and sum(seen.values()) < 10 * number):
            seen[digests.index(digest_of(EKFACLinearOperator.load(path)))] += 1
    finally:
        stop.touch()
        crashed = [ended_by_signal(pid) for pid in savers]
    return {"different": len(seen), "crashed": any(crashed), "leftovers": len(leftovers(folder))}


EXPERIMENTS: Final = {
    function.__name__: function
    for function in (at_random_moments, at_every_stage, on_a_full_disk, in_a_locked_folder, at_once)
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    results = {}
    for experiment in sys.argv[2:]:
        name, number = experiment.split(":")
        own = Path(sys.argv[1]) / experiment
        own.mkdir()
        results[experiment] = EXPERIMENTS[name](own, int(number))
    print(json.dumps(results))  # noqa: T201
