"""What was measured, as plain values for a file."""

import dataclasses
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.records import write_document
from benchmarks.speed.contenders import BY_NAME
from benchmarks.speed.penalty import names
from benchmarks.speed.penalty.comparisons import Comparison
from benchmarks.versions import versions

FORMAT = "rotate_ewc.benchmarks.speed.penalty/1"


@dataclass(frozen=True)
class Record:
    """One case.

    Attributes:
        case: Its name.
        parameters: Number of parameters.
        batch: Examples in a batch.
        repetitions: Calls of each contender in its turn.
        rounds: Milliseconds of one step or one penalty in each round, by contender.
        statuses: Status of who is absent or wrong, by contender.
        messages: What else is to be said of these.
        values: What the penalty and its peers found, for the same displacement.
        comparisons: Ratios and overheads.
    """

    case: str
    parameters: int
    batch: int
    repetitions: int
    rounds: dict[str, list[float]]
    statuses: dict[str, str]
    messages: dict[str, str]
    values: dict[str, float]
    comparisons: list[Comparison]

    @property
    def milliseconds(self) -> dict[str, float]:
        """Medians over rounds, by contender."""
        return {name: statistics.median(times) for name, times in self.rounds.items()}


@dataclass(frozen=True)
class Duration:
    """Something outside training that is to be short, beside something else.

    Attributes:
        label: What it is.
        seconds: Times in all rounds.
        other_label: What is beside it.
        other_seconds: Times of that.
        target: What the median is to be below, in seconds; None for less than the other.
    """

    label: str
    seconds: list[float]
    other_label: str
    other_seconds: list[float]
    target: float | None = None

    @property
    def median(self) -> float:
        """Median time."""
        return statistics.median(self.seconds)

    @property
    def other_median(self) -> float:
        """Median time of what is beside it."""
        return statistics.median(self.other_seconds)

    @property
    def met(self) -> bool:
        """Whether it is as short as it is to be."""
        return self.median < (self.other_median if self.target is None else self.target)


def write(
    path: Path,
    configuration: dict[str, Any],
    records: Iterable[Record],
    durations: Sequence[Duration],
) -> None:
    """Write a file that is, at every moment, the old one or the new one.

    Args:
        path: The JSON file; its folder must exist.
        configuration: The options.
        records: What was measured of each case.
        durations: What was measured outside training.
    """
    document = {
        "format": FORMAT,
        "configuration": configuration,
        "records": [_plain(record) for record in records],
        "durations": [
            {**dataclasses.asdict(one), "median": one.median, "met": one.met} for one in durations
        ],
        "versions": {**versions(), **{peer: _version(peer) for peer in names.PEERS}},
    }
    write_document(path, document)


def _plain(record: Record) -> dict[str, Any]:
    """A record with numbers that can be computed from others, for readers."""
    fields = dataclasses.asdict(record)
    fields["milliseconds"] = record.milliseconds
    for plain, comparison in zip(fields["comparisons"], record.comparisons, strict=True):
        plain["met"] = comparison.met
    return fields


def _version(peer: str) -> str | None:
    """The version of a peer; None where it is not installed."""
    try:
        return version(BY_NAME[peer].distribution)
    except PackageNotFoundError:
        return None
