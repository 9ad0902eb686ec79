"""A process that loads mutated snapshots, one after the other, and tells what became of them.

Run as `python -m tests.helpers.snapshot_fuzzer FOLDER FIRST COUNT`: with a limit of memory and of
time for each, and apart from the tests, so that these outlive it if it should crash.
"""

from __future__ import annotations

import io
import json
import random
import resource
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import torch

from rotate_ewc import EKFACLinearOperator, EKFACPenalty, SnapshotError
from rotate_ewc.inspection.snapshot_file import read as inspect
from rotate_ewc.io import files
from rotate_ewc.io.header import header_text
from tests.helpers.exact import exact_penalty
from tests.helpers.honest_snapshots import (
    Honest,
    Loaded,
    check_consistent,
    digest_of,
    honest_snapshots,
    read,
)
from tests.helpers.mutated_bytes import mutated_bytes
from tests.helpers.mutated_states import mutated_state

SECONDS_FOR_EACH: Final = 20
LONGEST_MESSAGE: Final = 600
# What one mutated snapshot may reserve beyond the honest ones.
SPARE_BYTES: Final = 2**29

ROUTES: Final = ("bytes", "bytes", "state", "state", "torch.save", "torch.save bytes")

Outcome = str


def outcome(folder: Path, seed: int) -> Outcome:
    """Make a mutated snapshot, load it, and say what became of it.

    Args:
        folder: For files.
        seed: Of the mutation.

    Returns:
        `"same"`, `"consistent"` or `"refused"`.

    Raises:
        AssertionError: If something else became of it.
    """
    rng = random.Random(seed)
    honest = rng.choice(list(honest_snapshots(str(folder)).values()))
    route = ROUTES[seed % len(ROUTES)]
    path = folder / f"{seed}.safetensors"
    try:
        if route == "bytes":
            path.write_bytes(mutated_bytes(rng, honest.content))
            return _of_file(honest, path, must_be_same=True)
        if route == "state":
            try:
                files.save(mutated_state(rng, honest.state), path)
            except UnicodeEncodeError:
                # Half a character, in the name of a tensor.
                return "unwritable"
            return _of_file(honest, path, must_be_same=False)
        return _of_state(honest, _sent(rng, honest, damaged=route.endswith("bytes")))
    finally:
        path.unlink(missing_ok=True)


def _sent(rng: random.Random, honest: Honest, *, damaged: bool) -> Any:
    """Return a mutated state as it comes out of a file of `torch.save`; None if nothing does."""
    buffer = io.BytesIO()
    torch.save(honest.state if damaged else mutated_state(rng, honest.state), buffer)
    content = mutated_bytes(rng, buffer.getvalue()) if damaged else buffer.getvalue()
    try:
        return torch.load(io.BytesIO(content), weights_only=True)
    # Whatever torch has to say about its own files is no concern of a snapshot's.
    except Exception:
        return None


def _of_file(honest: Honest, path: Path, *, must_be_same: bool) -> Outcome:
    def load() -> Loaded:
        return read(honest.kind, path)

    result, loaded = _judged(load, repr(str(path)))
    also, _ = _judged(lambda: inspect(path), repr(str(path)))
    assert result == "refused" or also != "refused", "inspected files can be loaded, and conversely"
    if loaded is None:
        return result
    if digest_of(loaded) == honest.digest:
        return "same"
    assert not must_be_same, "damage was not noticed"
    check_consistent(loaded)
    return "consistent"


def _of_state(honest: Honest, state: Any) -> Outcome:
    """Load a state into an object that has another; afterwards it has one or the other."""
    if state is None:
        return "unreadable"
    receiver = receiver_of(honest)
    before = digest_of(receiver)
    if not isinstance(state, dict) and honest.kind is EKFACPenalty:
        # Torch itself refuses these.
        return "unreadable"
    result, _ = _judged(lambda: receiver.load_state_dict(state), "")
    if result == "refused":
        assert digest_of(receiver) == before, "what was refused has changed the receiver"
        return result
    check_consistent(receiver)
    return "same" if digest_of(receiver) == before else "consistent"


def receiver_of(honest: Honest) -> Loaded:
    """Return an object that holds what a snapshot holds."""
    if honest.kind is EKFACLinearOperator:
        return EKFACLinearOperator.from_state_dict(honest.state)
    header = json.loads(header_text(honest.state))
    receiver = exact_penalty(mode=header["mode"], weighting=header["weighting"])
    receiver.load_state_dict(honest.state)
    return receiver


def _judged(load: Callable[[], Any], name: str) -> tuple[Outcome, Any]:
    """Load something, and look at the message if it is refused; any other error is a bug."""
    try:
        return "loaded", load()
    except SnapshotError as error:
        message = str(error)
        assert message.startswith(name), f"the message does not name the file: {message[:200]}"
        told = len(message) - len(name)
        assert told < LONGEST_MESSAGE, f"the message has {told} characters: {message[:300]}"
        assert message.isprintable(), f"the message is not printable: {message[:300]!r}"
        return "refused", None


def run(folder: Path, first: int, count: int) -> dict[str, Any]:
    """Try `count` mutations with seeds from `first` on."""
    found: Counter[Outcome] = Counter()
    failures: list[str] = []
    honest = honest_snapshots(str(folder))
    # What reading honest snapshots takes, whatever it loads and caches.
    for seed in range(first, first + 12):
        with suppress(Exception):
            outcome(folder, seed)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + SPARE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    signal.signal(signal.SIGALRM, _too_long)
    for seed in range(first, first + count):
        signal.alarm(SECONDS_FOR_EACH)
        try:
            found[outcome(folder, seed)] += 1
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            told = f"{type(error).__name__}: {error}"[:400]
            failures.append(f"seed {seed}: {told} ({where.filename}:{where.lineno})")
        signal.alarm(0)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {
        "outcomes": dict(found),
        "failures": failures,
        "grown_kib": grown,
        "honest_bytes": max(len(one.content) for one in honest.values()),
    }


def _too_long(*_: Any) -> None:
    raise TimeoutError(f"took more than {SECONDS_FOR_EACH} s")


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(run(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))  # noqa: T201
