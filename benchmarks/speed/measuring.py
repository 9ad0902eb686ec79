"""How long work takes and how much memory, and how fast this machine is.

What is to be compared takes turns, so that a machine's moods hit all alike.
"""

import contextlib
import ctypes
import gc
import resource
import statistics
import sys
import timeit
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TypeVar

import torch
from tqdm import tqdm

Name = TypeVar("Name")
Value = TypeVar("Value")

# The products [m, k] x [k, n] whose rate is measured; the best of them makes the floor.
SHAPES = ((2048, 1024, 1024), (16_000, 576, 576))
LONG_ENOUGH = 0.5  # seconds for one measurement
REPETITIONS, WARM_UPS = 5, 3
STATUS_FILE, CLEAR_FILE = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"
KIBIBYTE = 2**10


def product_rates(*, quick: bool) -> dict[str, float]:
    """Measure products in float32: billions of operations per second, by shape."""
    rates = {}
    for m, k, n in SHAPES:
        left, right, out = torch.randn(m, k), torch.randn(k, n), torch.empty(m, n)
        seconds = statistics.median(_times(lambda: torch.mm(left, right, out=out), quick))  # noqa: B023
        rates[f"{m}x{k}x{n}"] = 2.0 * m * k * n / seconds / 1e9
    return rates


def eigh_times(sizes: Iterable[int], *, quick: bool) -> dict[str, list[float]]:
    """Measure ``eigh`` of covariances of rectified noise: seconds of each repetition, by size.

    How long it takes depends a little on the eigenvalues, and layers' inputs are often rectified.
    """
    times = {}
    for size in sorted(set(sizes)):
        data = torch.relu(torch.randn(2 * size, size) @ torch.randn(size, size))
        covariance = data.T @ data / len(data)
        times[str(size)] = _times(lambda: torch.linalg.eigh(covariance), quick)  # noqa: B023
    return times


def _times(work: Callable[[], object], quick: bool) -> list[float]:
    """Seconds of a few repetitions, after one that does not count."""
    work()
    times: list[float] = []
    while not times or (not quick and sum(times) < LONG_ENOUGH and len(times) < REPETITIONS):
        start = perf_counter()
        work()
        times.append(perf_counter() - start)
    return times


def peak_growth(work: Callable[[], Value]) -> tuple[Value, int]:
    """Do some work; by how many bytes is the peak of resident memory in it above what was before?

    Where the system does not tell, the highest peak since the start of the process is taken
    instead, whose growth is less where there was a higher peak before the work.
    """
    gc.collect()
    # What was freed is returned to the system; otherwise it would be used again, and not be seen.
    with contextlib.suppress(OSError, AttributeError):  # not the C library of GNU
        ctypes.CDLL(None).malloc_trim(0)
    try:
        CLEAR_FILE.write_text(RESET_PEAK)
        before, peak = _status("VmRSS"), partial(_status, "VmHWM")
    except (OSError, KeyError):
        before, peak = peak_since_start(), partial(peak_since_start)
    value = work()
    return value, max(peak() - before, 0)


def _status(field: str) -> int:
    """Bytes that the system gives for this process."""
    lines = STATUS_FILE.read_text(encoding="ascii").splitlines()
    values = dict(line.split(":", maxsplit=1) for line in lines)
    return int(values[field].split()[0]) * KIBIBYTE


def peak_since_start() -> int:
    """The highest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * KIBIBYTE


def turns(contenders: Sequence[Name], rounds: int) -> Iterator[tuple[int, Name]]:
    """Whose turn it is in which round, from 1.

    Every other round runs backwards, so that a steady drift favours nobody.
    """
    for number in range(1, rounds + 1):
        for name in contenders if number % 2 else reversed(contenders):
            yield number, name


def time_in_rounds(
    contenders: Mapping[Name, Callable[[], object]],
    *,
    rounds: int,
    repetitions: int,
    warm_ups: int = WARM_UPS,
) -> dict[Name, list[float]]:
    """Time all contenders in every round, within this process."""
    medians: dict[Name, list[float]] = {name: [] for name in contenders}
    total = rounds * len(contenders)
    # disable=None: no bar unless standard error is a terminal
    bar = tqdm(turns(list(contenders), rounds), total=total, unit="turn", disable=None)
    for _, name in bar:
        timeit.timeit(contenders[name], number=warm_ups)
        seconds = timeit.repeat(contenders[name], number=1, repeat=repetitions)
        medians[name].append(statistics.median(seconds))
    return medians


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """The median over rounds of the ratio of two contenders in the same round."""
    return statistics.median(map(float.__truediv__, numerators, denominators))
