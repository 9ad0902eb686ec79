"""Ratios of what was timed, and the targets they are to meet."""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.rounds import median_ratio
from benchmarks.speed import names as speed
from benchmarks.speed.penalty import names

AT_MOST, AT_LEAST = "≤", "≥"
RATIO, OVERHEAD = "×", "%"

Rounds = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Comparison:
    """One number that says what something costs.

    Attributes:
        label: What is compared with what.
        value: Median over rounds of the ratio within a round, or what it is above 1 in percent;
            None where one of the two was not measured.
        unit: One of :data:`RATIO` and :data:`OVERHEAD`.
        relation: How value and target are to be; empty where there is no target.
        target: The target.
    """

    label: str
    value: float | None
    unit: str = RATIO
    relation: str = ""
    target: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None without a target or a value."""
        if self.value is None or self.target is None:
            return None
        if self.relation == AT_MOST:
            return self.value <= self.target
        return self.value >= self.target


def compare(
    case: str, rounds: Rounds, tasks: Sequence[int], separate_tasks: int
) -> list[Comparison]:
    """Compare what was measured in a case.

    Args:
        case: Its name.
        rounds: Times in each round by contender, without those that cannot be compared.
        tasks: Numbers of tasks of the merged penalties, rising.
        separate_tasks: Number of separate tasks.

    Returns:
        All comparisons, also those that lack something.
    """
    return [
        *_of_penalties(rounds, tasks),
        *_of_peers(case, rounds),
        *_of_separate(case, rounds, separate_tasks),
        *_of_steps(case, rounds, tasks),
    ]


def ratio(rounds: Rounds, numerator: str, denominator: str) -> float | None:
    """The median over rounds of a ratio within a round; None where one is absent."""
    if numerator not in rounds or denominator not in rounds:
        return None
    return median_ratio(rounds[numerator], rounds[denominator])


def overhead(rounds: Rounds, contender: str) -> float | None:
    """How much longer a step takes than a plain one, in percent."""
    found = ratio(rounds, contender, names.STEP)
    return None if found is None else 100 * (found - 1)


def _of_penalties(rounds: Rounds, tasks: Sequence[int]) -> Iterator[Comparison]:
    """Penalties beside a plain step, and after many tasks beside after few."""
    for number in tasks:
        name = names.penalty_after(number)
        yield Comparison(f"{name} / {names.STEP}", ratio(rounds, name, names.STEP))
    few, many = tasks[0], tasks[-1]
    if few < many:
        value = ratio(rounds, names.penalty_after(many), names.penalty_after(few))
        yield Comparison(f"penalty, {many} / {few} tasks", value, RATIO, AT_MOST, 1.1)


def _of_peers(case: str, rounds: Rounds) -> Iterator[Comparison]:
    """The penalty of one task beside the peers."""
    ours = names.ours_beside_peers(case)
    value = ratio(rounds, ours, speed.NNGEOMETRY)
    yield Comparison(f"{ours} / {speed.NNGEOMETRY}", value, RATIO, AT_MOST, 1.0)
    value = ratio(rounds, speed.CURVLINOPS, ours)
    yield Comparison(f"{speed.CURVLINOPS} / {ours}", value, RATIO, AT_LEAST, 2.0)


def _of_separate(case: str, rounds: Rounds, tasks: int) -> Iterator[Comparison]:
    """Penalties called one by one beside the same tasks in one penalty."""
    if case in names.WITH_SEPARATE:
        one, other = names.one_by_one(tasks), names.separate(tasks)
        yield Comparison(f"{one} / {other}", ratio(rounds, one, other), RATIO, AT_LEAST, 2.0)


def _of_steps(case: str, rounds: Rounds, tasks: Sequence[int]) -> Iterator[Comparison]:
    """What steps take more than plain ones."""
    perceptron = case in names.PERCEPTRONS
    for number in tasks:
        name = names.step_after(number)
        label, value = f"{name}: overhead", overhead(rounds, name)
        if perceptron:
            yield Comparison(label, value, OVERHEAD)
        else:
            yield Comparison(label, value, OVERHEAD, AT_MOST, 25.0)
    value = overhead(rounds, names.TANGENT)
    target = 30.0 if perceptron else 25.0
    yield Comparison(f"{names.TANGENT}: overhead", value, OVERHEAD, AT_MOST, target)
    if perceptron:
        for name in (names.PROXIMAL, names.ROTATED):
            yield Comparison(f"{name}: overhead", overhead(rounds, name), OVERHEAD)


def relative_range(rounds: Rounds, contender: str) -> tuple[float, float, float]:
    """Least, median and largest ratio over rounds of a contender and a plain step."""
    divide: Callable[[float, float], float] = float.__truediv__
    ratios = list(map(divide, rounds[contender], rounds[names.STEP]))
    return min(ratios), statistics.median(ratios), max(ratios)
