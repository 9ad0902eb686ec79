"""Ratios of what was timed in training, and the targets they are to meet."""

from dataclasses import dataclass
from typing import Literal

from benchmarks.speed import names
from benchmarks.speed.results import Training

Relation = Literal["≤", "≥"]


@dataclass(frozen=True)
class Comparison:
    """One number that says what something costs."""

    label: str
    value: float | None  # median over rounds of the ratio within a round; None if one is absent
    target: float | None = None
    relation: Relation = "≤"
    overhead: bool = False  # whether it is what the ratio is above 1, in percent

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None without a target or a value."""
        if self.value is None or self.target is None:
            return None
        return self.value <= self.target if self.relation == "≤" else self.value >= self.target


def compare(record: Training) -> list[Comparison]:
    """Compare penalties and steps with plain steps, peers and each other."""
    found = []

    def quotient(
        one: str, other: str, target: float | None = None, relation: Relation = "≤", label: str = ""
    ) -> None:
        value = record.ratio(one, other)
        found.append(Comparison(label or f"{one} / {other}", value, target, relation))

    def overhead(name: str, target: float | None = None) -> None:
        ratio = record.ratio(name, names.STEP)
        percent = ratio and 100 * (ratio - 1)
        found.append(Comparison(f"{name}: overhead", percent, target, overhead=True))

    penalties = {tasks: names.after(names.PENALTY, tasks) for tasks in record.tasks}
    for penalty in penalties.values():
        quotient(penalty, names.STEP)
    few, many = record.tasks[0], record.tasks[-1]
    if few < many:
        label = f"penalty, {many} / {few} tasks"
        quotient(penalties[many], penalties[few], 1.1, label=label)
    ours = names.ours_beside_peers(record.case)
    quotient(ours, names.NNGEOMETRY, 1.0)
    quotient(names.CURVLINOPS, ours, 2.0, "≥")
    if record.case in names.WITH_SEPARATE:
        tasks = record.separate_tasks
        quotient(names.ONE_BY_ONE.format(tasks), names.after(names.SEPARATE, tasks), 2.0, "≥")

    perceptron = record.case in names.PERCEPTRONS
    for tasks in record.tasks:
        overhead(names.after(names.STEP_WITH_PENALTY, tasks), None if perceptron else 25.0)
    overhead(names.TANGENT, 30.0 if perceptron else 25.0)
    if perceptron:
        overhead(names.PROXIMAL)
        overhead(names.ROTATED)
    return found
