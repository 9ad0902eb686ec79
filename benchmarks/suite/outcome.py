"""From records to results: which strength was chosen, and what it then reached.

The protocol is the same for every method. Its strength λ is chosen by the mean accuracy on training
images that are held out, from as many values and with the same seeds as every other method's. Only
then are the test images looked at, with the chosen strength and with the default.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf, log10
from statistics import fmean
from typing import Any, NamedTuple

from benchmarks.methods import METHODS
from benchmarks.results import Record, group_by_label

# Options that say how a run was made, or that the protocol varies: all others are the setting. The
# replay buffer is part of a method's label, so that a method with and without stand side by side.
NOT_OF_THE_SETTING = frozenset({"strength", "validate", "threads", "device", "jobs", "replay"})
POINTS = 3.0  # of accuracy, which may be lost within the width of an optimum
ROUNDING = 1e-9  # of a point

Search = Mapping[float, Sequence[Record]]


@dataclass(frozen=True)
class MethodResult:
    """What a method reached in one experiment."""

    label: str
    search: Search  # on held-out training images, by ascending strength; empty without a search
    tested: Sequence[Record]  # on the test images with the chosen strength, by seed
    at_default: Sequence[Record]  # on the test images with the default strength, by seed
    found: Sequence[Record]  # on held-out training images, with a strength that it finds by itself
    strength: float | str | None  # the chosen strength; None for methods without
    default: float | str | None  # the default strength; None for methods without

    @property
    def at_edge(self) -> bool:
        """Whether the chosen strength is the smallest or largest that was tried."""
        return len(self.search) > 1 and self.strength in (min(self.search), max(self.search))

    @property
    def searched(self) -> list[Record]:
        """All records of the search."""
        return [*(record for group in self.search.values() for record in group), *self.found]

    @property
    def regret(self) -> float | None:
        """How much accuracy on held-out images the default strength loses; None if unknown."""
        tried = self.search.get(self.default, []) if isinstance(self.default, float) else self.found
        if not tried or not self.search:
            return None
        return max(map(mean_accuracy, self.search.values())) - mean_accuracy(tried)

    @property
    def records(self) -> list[Record]:
        """All records, each once though it may stand in two places."""
        found = (*self.tested, *self.at_default, *self.searched)
        return list({id(record): record for record in found}.values())

    @property
    def jointly(self) -> bool:
        """Whether all tasks were learned at once: the upper bound, which competes with nobody."""
        return any(record.trained_jointly for record in self.tested)


@dataclass(frozen=True)
class Experiment:
    """All methods on one scenario, with the same options."""

    scenario: str
    setting: Mapping[str, Any]  # the options that the runs have in common
    results: Sequence[MethodResult]  # one for each method, in the order of ``METHODS``

    @property
    def tested(self) -> dict[str, Sequence[Record]]:
        """Records with the chosen strength, of the methods that were tested."""
        return {result.label: result.tested for result in self.results if result.tested}

    @property
    def records(self) -> list[Record]:
        """All records."""
        return [record for result in self.results for record in result.records]


def experiments(records: Iterable[tuple[str, Record]]) -> list[Experiment]:
    """Sort pairs of a scenario's name and a record into experiments."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for scenario, record in records:
        groups.setdefault((scenario, repr(sorted(_setting(record).items()))), []).append(record)
    return [
        Experiment(scenario, _setting(group[0]), _results(group))
        for (scenario, _), group in sorted(groups.items())
    ]


def _setting(record: Record) -> dict[str, Any]:
    """The options of a run that every run of the same experiment shares."""
    options = record.configuration.items()
    return {name: value for name, value in options if name not in NOT_OF_THE_SETTING}


def _results(records: Sequence[Record]) -> list[MethodResult]:
    """Apply the protocol to the records of one experiment, method by method."""
    places = {name: place for place, name in enumerate(METHODS)}
    results = [_result(label, group) for label, group in group_by_label(records).items()]
    return sorted(
        results,
        key=lambda result: (
            places.get(result.records[0].method, len(places)) if result.records else len(places),
            result.label,
        ),
    )


def _result(label: str, records: Sequence[Record]) -> MethodResult:
    """Apply the protocol to the records of one method."""
    search = by_strength(record for record in records if record.for_validation)
    tests = by_strength(record for record in records if not record.for_validation)
    known = METHODS.get(records[0].method)
    default = known.default_strength if known else None
    strength: float | str | None = best_strength(search)
    if strength is None:
        # Without a search nothing was chosen but by whoever typed the command.
        strength = default if default in tests else next(iter(tests), None)
    return MethodResult(
        label=label,
        search={value: group for value, group in search.items() if isinstance(value, float)},
        tested=tests.get(strength, []),
        at_default=tests.get(default, []),
        found=[record for v, group in search.items() if isinstance(v, str) for record in group],
        strength=strength,
        default=default,
    )


def by_strength(records: Iterable[Record]) -> dict[Any, list[Record]]:
    """Group records by strength, ascending and then what is no number; sort groups by seed."""
    groups: dict[Any, list[Record]] = {}

    def place(record: Record) -> tuple[float, int]:
        strength = record.strength or 0.0
        return inf if isinstance(strength, str) else strength, record.seed

    for record in sorted(records, key=place):
        groups.setdefault(record.strength, []).append(record)
    return groups


def best_strength(search: Mapping[Any, Sequence[Record]]) -> float | None:
    """The number with the highest mean accuracy; of equals, the smallest. None if there is none."""
    numbers = [value for value in search if isinstance(value, float)]
    return max(numbers, key=lambda value: mean_accuracy(search[value]), default=None)


def mean_accuracy(records: Sequence[Record]) -> float:
    """Mean over seeds of the average accuracy at the end."""
    return fmean(record.average_accuracy for record in records)


class Interval(NamedTuple):
    """The strengths around the best with which a method is nearly as good: its width."""

    low: float  # lower end, in decades from the best strength, thus never positive
    high: float  # upper end, in decades from the best strength, thus never negative
    open_low: bool  # whether ``low`` is the edge of the search, and the interval goes on
    open_high: bool  # whether ``high`` is the edge of the search, and the interval goes on

    def __str__(self) -> str:
        """The width in decades, as tables show it."""
        return f"{'≥ ' * (self.open_low or self.open_high)}{self.high - self.low:.1f}"


def points_from_best(search: Search) -> list[tuple[float, float]]:
    """Decades and percentage points from the best of a search, by strength above zero."""
    means = {value: mean_accuracy(search[value]) for value in sorted(search) if value > 0}
    if not means:
        return []
    best = max(means, key=lambda value: means[value])
    return [
        (log10(value) - log10(best), 100 * (mean - means[best])) for value, mean in means.items()
    ]


def interval_within(search: Search, points: float = POINTS) -> Interval | None:
    """Find the strengths around the best with which at most some points of accuracy are lost.

    Between strengths that were searched, accuracy is taken to be linear in log λ.
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
