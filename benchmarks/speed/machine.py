"""What this machine is, and how fast it does large products and ``eigh``."""

import os
import platform
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

# The products [m, k] x [k, n] whose rate is measured; the best of them makes the floor.
SHAPES = ((2048, 1024, 1024), (16_000, 576, 576))
LONG_ENOUGH = 0.5  # seconds for one measurement
REPETITIONS = 5
PROCESSOR_FILE = Path("/proc/cpuinfo")


def describe_machine() -> dict[str, Any]:
    """The processor by name, where the system tells it, and its number of hardware threads."""
    return {"processor": _processor(), "cpu_count": os.cpu_count()}


def _processor() -> str:
    try:
        lines = PROCESSOR_FILE.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def product_rates(*, quick: bool) -> dict[str, float]:
    """Measure the rate of large products in float32.

    Args:
        quick: Whether to measure each only once.

    Returns:
        Billions of floating-point operations per second, by shape.
    """
    rates = {}
    for m, k, n in SHAPES:
        left, right = torch.randn(m, k), torch.randn(k, n)
        out = torch.empty(m, n)
        seconds = statistics.median(_times(lambda: torch.mm(left, right, out=out), quick))  # noqa: B023
        rates[f"{m}x{k}x{n}"] = 2.0 * m * k * n / seconds / 1e9
    return rates


def eigh_times(sizes: Iterable[int], *, quick: bool) -> dict[int, list[float]]:
    """Measure ``eigh`` of covariances of rectified noise.

    How long it takes depends a little on the eigenvalues, and layers' inputs are often rectified.

    Args:
        sizes: Their sizes.
        quick: Whether to measure each only once.

    Returns:
        Seconds of each repetition, by size.
    """
    times = {}
    for size in sorted(set(sizes)):
        data = torch.relu(torch.randn(2 * size, size) @ torch.randn(size, size))
        covariance = data.T @ data / len(data)
        times[size] = _times(lambda: torch.linalg.eigh(covariance), quick)  # noqa: B023
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
