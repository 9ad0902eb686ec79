"""What was measured."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any, ClassVar

from benchmarks.speed import names
from benchmarks.speed.measuring import median_ratio

MEASURED, WRONG, REFUSED, MISSING = "measured", "wrong", "refused", "not installed"


@dataclass
class Result:
    """What was measured of one contender."""

    name: str
    status: str  # one of MEASURED, WRONG, REFUSED and MISSING
    message: str = ""  # why it was refused, how wrong it is, or what it computes, if not the same
    seconds: list[float] = field(default_factory=list)  # in every round
    # What is compared with this package's: the traces of all estimations, the first of which has
    # no time, or the value of the penalty.
    values: list[float] = field(default_factory=list)
    version: str | None = None
    kind: str = ""  # what it can be compared with
    memory: int | None = None  # bytes by which the first estimation raised the peak
    ratio: float | None = None  # median over rounds of its time over this package's, if comparable

    @property
    def median(self) -> float | None:
        """Median time over rounds."""
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def value(self) -> float | None:
        """Mean over estimations, whose sampled labels differ."""
        return statistics.fmean(self.values) if self.values else None

    def range_over(self, scale: Sequence[float]) -> tuple[float, float, float] | None:
        """Median, least and largest multiple of a single time, or of those in the same rounds."""
        found = [one / other for one, other in zip(self.seconds, cycle(scale), strict=False)]
        return (statistics.median(found), min(found), max(found)) if found else None


@dataclass(frozen=True, kw_only=True)
class _Case:
    """What all records have."""

    case: str
    batch: int  # examples in a batch
    rounds: int  # number of rounds
    results: list[Result]
    versions: dict[str, Any]

    @property
    def shown(self) -> list[Result]:
        """The results in a figure: all but the plain step, which is the line at 1."""
        return [one for one in self.results if one.name != names.STEP]


@dataclass(frozen=True, kw_only=True)
class Estimation(_Case):
    """One case with one Fisher type."""

    format: ClassVar[str] = "rotate_ewc.benchmarks.speed/2"
    unit: ClassVar[str] = "the floor"
    legend: ClassVar[str] = (
        "Hollow: another quantity, budget, rank or set of parameters. Lines: the range over rounds."
    )

    fisher: str
    fraction: float  # part of the case's examples
    examples: int
    tolerance: float  # relative difference of traces up to which results count as equal
    rates: dict[str, list[float]]  # GFLOP/s in all rounds, by the shape of a product
    eigh: dict[str, list[float]]  # seconds of every ``eigh``, by size
    gigaflop: dict[str, float]  # necessary operations by purpose, in billions
    floor_seconds: dict[str, float]  # what they take at least, by purpose

    @property
    def floor(self) -> float:
        """The least time that an estimation can take, in seconds."""
        return sum(self.floor_seconds.values())

    @property
    def place(self) -> tuple[Any, ...]:
        """What makes it another record than others; records are sorted by it."""
        return list(names.CASES).index(self.case), names.FISHERS.index(self.fisher), -self.fraction

    @property
    def heading(self) -> str:
        """Case, Fisher type and floor, for a figure."""
        part = "" if self.fraction == 1 else f", {self.fraction:g} of the data"
        floor = f"floor {self.floor:.3g} s"
        return f"{self.case}: {names.CASES[self.case]}\n{self.fisher}{part}, {floor}"

    @property
    def scale(self) -> Sequence[float]:
        """The floor, of which other times are multiples in a figure."""
        return [self.floor]


@dataclass(frozen=True, kw_only=True)
class Training(_Case):
    """The steps and penalties of one case."""

    format: ClassVar[str] = "rotate_ewc.benchmarks.speed.penalty/3"
    unit: ClassVar[str] = "a plain step"
    legend: ClassVar[str] = (
        "Filled: a penalty and its gradient. Hollow: whole steps. Lines: range over rounds."
    )

    parameters: int  # their number
    repetitions: int  # calls of each contender in its turn
    tasks: list[int]  # numbers of tasks of the merged penalties, rising

    @property
    def place(self) -> tuple[Any, ...]:
        """The case."""
        return (list(names.STEP_CASES).index(self.case),)

    @property
    def heading(self) -> str:
        """Case, and the time of a plain step."""
        step = f"step {1_000 * statistics.median(self.scale):.3g} ms"
        return f"{self.case}: {names.STEP_CASES[self.case]}\nbatches of {self.batch}, {step}"

    @property
    def scale(self) -> Sequence[float]:
        """The plain step in every round, which comes first."""
        return self.results[0].seconds

    def ratio(self, numerator: str, denominator: str) -> float | None:
        """The median over rounds of a ratio within a round; None if one is absent or wrong."""
        times = {one.name: one.seconds for one in self.results if one.status == MEASURED}
        if numerator not in times or denominator not in times:
            return None
        return median_ratio(times[numerator], times[denominator])


@dataclass(frozen=True)
class Duration:
    """The times of something outside training, and of something else, in all rounds."""

    label: str
    seconds: list[float]
    other_label: str
    other_seconds: list[float]


Record = Estimation | Training
