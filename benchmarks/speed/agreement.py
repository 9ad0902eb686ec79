"""Whether contenders found the same matrix: a fast wrong answer does not count."""

import dataclasses
from collections.abc import Sequence

from benchmarks.rounds import median_ratio
from benchmarks.speed import names
from benchmarks.speed.contenders import Kind
from benchmarks.speed.results import MEASURED, WRONG, Result

TOLERANCES = {names.MC: 1e-2, names.TYPE2: 1e-4}
# Few sampled labels have traces that differ much.
QUICK_TOLERANCES = {names.MC: 0.5, names.TYPE2: 1e-4}


def tolerance_for(fisher: str, *, quick: bool) -> float:
    """How far traces may be apart, as a fraction of this package's."""
    return (QUICK_TOLERANCES if quick else TOLERANCES)[fisher]


def compare(results: Sequence[Result], tolerance: float) -> list[Result]:
    """Check the traces of all that compute what this package computes, and take ratios of times.

    Traces are means over all estimations: with sampled labels, each has its own seed.

    Args:
        results: What was measured.
        tolerance: Largest relative difference of two traces.

    Returns:
        The same, with the ratios to this package's times, and with those marked whose trace is
        another. Nothing is compared where this package was not measured.
    """
    measured = {result.name: result for result in results if result.status == MEASURED}
    ours = measured.get(names.OURS)
    if ours is None:
        return list(results)
    return [_compared(result, ours, tolerance) for result in results]


def _compared(result: Result, ours: Result, tolerance: float) -> Result:
    """One result with its ratio, or marked as wrong."""
    if result.status != MEASURED or result.kind != Kind.SAME.value:
        return result
    if result.trace is None or not ours.trace:
        return dataclasses.replace(result, status=WRONG, message="wrong: no trace")
    factor = result.trace / ours.trace
    if abs(factor - 1) > tolerance:
        return dataclasses.replace(result, status=WRONG, message=f"wrong ×{factor:.4g}")
    return dataclasses.replace(result, ratio=median_ratio(result.seconds, ours.seconds))
