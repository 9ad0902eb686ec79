"""From records to results: which strength was chosen, and what it then reached.

The protocol is the same for every method. Its strength λ is chosen by the mean accuracy on training
images that are held out, from as many values and with the same seeds as every other method's. Only
then are the test images looked at, with the chosen strength and with the default.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from benchmarks.methods import METHODS
from benchmarks.records import Record

# Options that say how a run was made, or that the protocol varies: all others are the setting.
NOT_OF_THE_SETTING = frozenset(
    {"methods", "seeds", "strength", "ewc_lambda", "baseline_ewc_lambda", "validate"}
    | {"threads", "device", "jobs", "replay"}
)


@dataclass(frozen=True)
class MethodResult:
    """What a method reached in one experiment.

    Attributes:
        label: Name for tables and plots.
        search: Records on held-out training images, by strength in ascending order; empty for
            methods without a strength, and where nothing was searched.
        tested: Records on the test images with the chosen strength, by seed.
        at_default: Records on the test images with the method's default strength, by seed; the same
            as ``tested`` where there is no strength to choose.
        strength: The chosen strength; None for methods without.
        default: The default strength; None for methods without.
    """

    label: str
    search: Mapping[float, Sequence[Record]]
    tested: Sequence[Record]
    at_default: Sequence[Record]
    strength: float | None
    default: float | None

    @property
    def at_edge(self) -> bool:
        """Whether the chosen strength is the smallest or largest that was tried."""
        return len(self.search) > 1 and self.strength in (min(self.search), max(self.search))

    @property
    def search_seconds(self) -> float:
        """What the search cost: wall time of its runs, one after another."""
        return sum(record.seconds for group in self.search.values() for record in group)

    @property
    def search_runs(self) -> int:
        """Number of runs in the search."""
        return sum(len(group) for group in self.search.values())


@dataclass(frozen=True)
class Experiment:
    """All methods on one scenario, with the same options.

    Attributes:
        scenario: Name of the scenario.
        setting: The options that the runs have in common.
        results: One for each method, in the order of :data:`benchmarks.methods.METHODS`.
    """

    scenario: str
    setting: Mapping[str, Any]
    results: Sequence[MethodResult]


def experiments(records: Iterable[tuple[str, Record]]) -> list[Experiment]:
    """Sort records into experiments.

    Args:
        records: Pairs of a scenario's name and a record, in any order.

    Returns:
        The experiments, by name and then by setting.
    """
    groups: dict[tuple[str, str], list[Record]] = {}
    for scenario, record in records:
        groups.setdefault((scenario, repr(sorted(setting_of(record).items()))), []).append(record)
    return [
        Experiment(scenario, setting_of(group[0]), results_of(group))
        for (scenario, _), group in sorted(groups.items())
    ]


def setting_of(record: Record) -> dict[str, Any]:
    """The options of a run that every run of the same experiment shares.

    The replay buffer is part of a method's label and not of the setting, so that a method with
    and without one stand side by side.
    """
    return {
        name: value
        for name, value in record.configuration.items()
        if name not in NOT_OF_THE_SETTING
    }


def results_of(records: Sequence[Record]) -> list[MethodResult]:
    """Apply the protocol to the records of one experiment, method by method."""
    labels: dict[str, list[Record]] = {}
    for record in records:
        labels.setdefault(record.label, []).append(record)
    order = list(METHODS)
    results = [_result(label, group) for label, group in labels.items()]
    return sorted(results, key=lambda result: _place(result, order))


def _place(result: MethodResult, order: list[str]) -> tuple[int, str]:
    """Where a method stands: joint training, the upper bound, is the last of METHODS."""
    record = (*result.tested, *(one for group in result.search.values() for one in group))[0]
    place = order.index(record.method) if record.method in order else len(order)
    return place, result.label


def _result(label: str, records: Sequence[Record]) -> MethodResult:
    """Apply the protocol to the records of one method."""
    search = by_strength(record for record in records if record.for_validation)
    tests = by_strength(record for record in records if not record.for_validation)
    known = METHODS.get(records[0].method)
    default = known.default_strength if known else None
    # Without a search nothing was chosen but by whoever typed the command.
    strength = best_strength(search) if search else _only(tests, default)
    return MethodResult(
        label=label,
        search={value: group for value, group in search.items() if value is not None},
        tested=tests.get(strength, []),
        at_default=tests.get(default, []),
        strength=strength,
        default=default,
    )


def _only(tests: Mapping[float | None, Sequence[Record]], default: float | None) -> float | None:
    """The strength that was tested without a search: the default, or else the first."""
    return default if default in tests else next(iter(tests), None)


def by_strength(records: Iterable[Record]) -> dict[float | None, list[Record]]:
    """Group records by strength, ascending, and sort each group by seed."""
    groups: dict[float | None, list[Record]] = {}
    for record in sorted(records, key=lambda one: (one.strength or 0.0, one.seed)):
        groups.setdefault(record.strength, []).append(record)
    return groups


def best_strength(search: Mapping[float | None, Sequence[Record]]) -> float | None:
    """The strength with the highest mean accuracy; of equals, the smallest."""
    return max(search, key=lambda value: fmean(record.average_accuracy for record in search[value]))
