"""Ratios of what was timed in training, and the targets they are to meet."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from benchmarks.speed import names
from benchmarks.speed.results import Training


@dataclass(frozen=True)
class Comparison:
    """One number that says what something costs."""

    label: str  # what is compared with what
    # Median over rounds of the ratio within a round; None where one of the two was not measured,
    # or is wrong.
    value: float | None
    target: float | None = None  # the target, if there is one
    relation: Literal["≤", "≥"] = "≤"  # how value and target are to be
    overhead: bool = False  # whether what the ratio is above 1 is meant, in percent

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None without a target or a value."""
        if self.value is None or self.target is None:
            return None
        return self.value <= self.target if self.relation == "≤" else self.value >= self.target


def compare(record: Training) -> list[Comparison]:
    """Compare what was measured in a case, also where something lacks."""
    return [*_of_penalties(record), *_of_steps(record)]


def _of_penalties(record: Training) -> Iterator[Comparison]:
    """Penalties beside a plain step, beside the peers, and among themselves."""

    def quotient(
        one: str, other: str, target: float | None = None, relation: Literal["≤", "≥"] = "≤"
    ) -> Comparison:
        return Comparison(f"{one} / {other}", record.ratio(one, other), target, relation)

    for number in record.tasks:
        yield quotient(names.penalty_after(number), names.STEP)
    few, many = record.tasks[0], record.tasks[-1]
    if few < many:
        value = record.ratio(names.penalty_after(many), names.penalty_after(few))
        yield Comparison(f"penalty, {many} / {few} tasks", value, 1.1)
    ours = names.ours_beside_peers(record.case)
    yield quotient(ours, names.NNGEOMETRY, 1.0)
    yield quotient(names.CURVLINOPS, ours, 2.0, "≥")
    if record.case in names.WITH_SEPARATE:
        tasks = record.separate_tasks
        yield quotient(names.one_by_one(tasks), names.separate(tasks), 2.0, "≥")


def _of_steps(record: Training) -> Iterator[Comparison]:
    """What steps take more than plain ones."""

    def overhead(name: str, target: float | None = None) -> Comparison:
        value = record.ratio(name, names.STEP)
        label = f"{name}: overhead"
        return Comparison(label, value and 100 * (value - 1), target, overhead=True)

    perceptron = record.case in names.PERCEPTRONS
    for number in record.tasks:
        yield overhead(names.step_after(number), None if perceptron else 25.0)
    yield overhead(names.TANGENT, 30.0 if perceptron else 25.0)
    if perceptron:
        yield overhead(names.PROXIMAL)
        yield overhead(names.ROTATED)
