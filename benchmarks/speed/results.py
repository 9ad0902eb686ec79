"""What was measured."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any, ClassVar

from benchmarks.speed import names
from benchmarks.speed.rounds import median_ratio

MEASURED, WRONG, REFUSED, MISSING = "measured", "wrong", "refused", "not installed"


@dataclass(frozen=True)
class Result:
    """What was measured of one contender."""

    name: str  # the contender
    status: str  # one of :data:`MEASURED`, :data:`WRONG`, :data:`REFUSED`, :data:`MISSING`
    # Why it was refused, or how wrong it is; otherwise what it computes, if that is not what all
    # do.
    message: str = ""
    # Time of one estimation, step or penalty in every round.
    seconds: list[float] = field(default_factory=list)
    # What is compared with this package's: the traces of all estimations, the first of which has
    # no time, or the value of the penalty.
    values: list[float] = field(default_factory=list)
    version: str | None = None  # version of its package
    kind: str = ""  # what it can be compared with
    memory: int | None = None  # Bytes by which the first estimation raised the peak
    # Median over rounds of its time over this package's; None where the two are not comparable.
    ratio: float | None = None

    @property
    def median(self) -> float | None:
        """Median time over rounds."""
        return statistics.median(self.seconds) if self.seconds else None

    def range_over(self, scale: Sequence[float]) -> tuple[float, float, float] | None:
        """Median, least and largest multiple of a single time, or of those in the same rounds."""
        found = [one / other for one, other in zip(self.seconds, cycle(scale), strict=False)]
        return (statistics.median(found), min(found), max(found)) if found else None

    @property
    def value(self) -> float | None:
        """Mean over estimations, whose sampled labels differ."""
        return statistics.fmean(self.values) if self.values else None


@dataclass(frozen=True, kw_only=True)
class Record:
    """One case."""

    format: ClassVar[str]
    unit: ClassVar[str]
    legend: ClassVar[str]

    case: str  # its name
    batch: int  # examples in a batch
    rounds: int  # number of rounds
    results: list[Result]  # what was measured of each contender
    versions: dict[str, Any]  # versions of software

    @property
    def place(self) -> tuple[Any, ...]:
        """What makes it another record than others; records are sorted by it."""
        raise NotImplementedError

    @property
    def heading(self) -> str:
        """What stands above it in a figure."""
        raise NotImplementedError

    @property
    def scale(self) -> Sequence[float]:
        """The times that others are multiples of in a figure: one, or one in every round."""
        raise NotImplementedError

    @property
    def shown(self) -> list[Result]:
        """The results in a figure: all but the plain step, which is the line at 1."""
        return [one for one in self.results if one.name != names.STEP]


@dataclass(frozen=True, kw_only=True)
class Estimation(Record):
    """One case with one Fisher type."""

    format: ClassVar[str] = "rotate_ewc.benchmarks.speed/2"
    unit: ClassVar[str] = "the floor"
    legend: ClassVar[str] = (
        "Hollow: another quantity, budget or set of parameters. Lines: the range over rounds."
    )

    fisher: str  # the Fisher type
    fraction: float  # part of the case's examples
    examples: int  # number of examples
    tolerance: float  # relative difference of traces up to which results count as equal
    # Billions of operations per second in all rounds, by the shape of a product.
    rates: dict[str, list[float]]
    eigh: dict[str, list[float]]  # seconds of every ``eigh``, by size
    gigaflop: dict[str, float]  # necessary operations by purpose, in billions
    floor_seconds: dict[str, float]  # what they take at least, by purpose

    @property
    def floor(self) -> float:
        """The least time that an estimation can take, in seconds."""
        return sum(self.floor_seconds.values())

    @property
    def place(self) -> tuple[Any, ...]:
        """Case, Fisher type and fraction."""
        return list(names.CASES).index(self.case), names.FISHERS.index(self.fisher), -self.fraction

    @property
    def heading(self) -> str:
        """Case, Fisher type and floor."""
        part = "" if self.fraction == 1 else f", {self.fraction:g} of the data"
        floor = f"floor {self.floor:.3g} s"
        return f"{self.case}: {names.CASES[self.case]}\n{self.fisher}{part}, {floor}"

    @property
    def scale(self) -> Sequence[float]:
        """The floor."""
        return [self.floor]


@dataclass(frozen=True, kw_only=True)
class Training(Record):
    """The steps and penalties of one case."""

    format: ClassVar[str] = "rotate_ewc.benchmarks.speed.penalty/2"
    unit: ClassVar[str] = "a plain step"
    legend: ClassVar[str] = (
        "Filled: a penalty and its gradient. Hollow: whole steps. Lines: range over rounds."
    )

    parameters: int  # number of parameters
    repetitions: int  # calls of each contender in its turn
    tasks: list[int]  # numbers of tasks of the merged penalties, rising
    separate_tasks: int  # number of separate tasks

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
        """The plain step, which comes first."""
        return self.results[0].seconds

    @property
    def comparable(self) -> dict[str, list[float]]:
        """Times in every round of those that were measured and are not wrong, by contender."""
        return {one.name: one.seconds for one in self.results if one.status == MEASURED}

    def ratio(self, numerator: str, denominator: str) -> float | None:
        """The median over rounds of a ratio within a round; None where one is absent."""
        times = self.comparable
        if numerator not in times or denominator not in times:
            return None
        return median_ratio(times[numerator], times[denominator])
