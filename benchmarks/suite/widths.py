"""How exactly a method's strength has to be chosen: the width of its optimum.

A method that needs its λ to within a factor of two costs whoever uses it a fine search in each new
setting; a method that is nearly as good over three decades can be used as it comes.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import log10
from statistics import fmean
from typing import NamedTuple

from benchmarks.records import Record
from benchmarks.suite.protocol import best_strength

POINTS = 3.0
ROUNDING = 1e-9  # of a point

Search = Mapping[float, Sequence[Record]]


class Width(NamedTuple):
    """The width of an optimum.

    Attributes:
        decades: Powers of ten between its ends.
        lower_bound: Whether the optimum goes on beyond the strengths that were searched.
    """

    decades: float
    lower_bound: bool

    def __str__(self) -> str:
        """The width, as tables show it."""
        return f"{'≥ ' if self.lower_bound else ''}{self.decades:.1f}"


class Interval(NamedTuple):
    """The strengths around the best with which a method is nearly as good.

    Attributes:
        low: Lower end, in decades from the best strength, thus never positive.
        high: Upper end, in decades from the best strength, thus never negative.
        open_low: Whether ``low`` is the edge of the search, and the interval goes on.
        open_high: Whether ``high`` is the edge of the search, and the interval goes on.
    """

    low: float
    high: float
    open_low: bool
    open_high: bool

    @property
    def width(self) -> Width:
        """Width of the interval."""
        return Width(self.high - self.low, self.open_low or self.open_high)


def points_from_best(search: Search) -> list[tuple[float, float]]:
    """Accuracies of a search, relative to its best.

    Args:
        search: Records by strength. Strengths that are not positive have no place on a logarithmic
            axis and are left out.

    Returns:
        Decades from the best strength, and percentage points from the best mean accuracy (zero or
        negative), by strength in ascending order; empty if nothing was searched.
    """
    positive: dict[float | None, Sequence[Record]] = {
        value: records for value, records in search.items() if value > 0 and records
    }
    if not positive:
        return []
    best = best_strength(positive)
    highest = _mean_accuracy(positive[best])
    return [
        (log10(value) - log10(best), 100 * (_mean_accuracy(positive[value]) - highest))
        for value in sorted(value for value in positive if value is not None)
        if best is not None
    ]


def _mean_accuracy(records: Sequence[Record]) -> float:
    return fmean(record.average_accuracy for record in records)


def interval_within(search: Search, points: float = POINTS) -> Interval | None:
    """Find the strengths around the best with which at most some points of accuracy are lost.

    Between strengths that were searched, accuracy is taken to be linear in log λ.

    Args:
        search: Records by strength.
        points: Percentage points of accuracy that may be lost.

    Returns:
        The contiguous interval around the best strength; None if nothing was searched.
    """
    curve = points_from_best(search)
    if not curve:
        return None
    best = next(place for place, (decades, _) in enumerate(curve) if decades == 0)
    low, open_low = _reach(curve[best::-1], -points)
    high, open_high = _reach(curve[best:], -points)
    return Interval(low, high, open_low, open_high)


def _reach(curve: Sequence[tuple[float, float]], level: float) -> tuple[float, bool]:
    """Where a curve from the best outwards first falls below a level; its end, if it never does."""
    for (near, before), (far, after) in pairwise(curve):
        if after < level - ROUNDING:
            return near + (far - near) * (before - level) / (before - after), False
    return curve[-1][0], True


def width_within(search: Search, points: float = POINTS) -> Width | None:
    """Measure the interval of :func:`interval_within`.

    Args:
        search: Records by strength.
        points: Percentage points of accuracy that may be lost.

    Returns:
        The width in decades; None if nothing was searched.
    """
    interval = interval_within(search, points)
    return None if interval is None else interval.width
