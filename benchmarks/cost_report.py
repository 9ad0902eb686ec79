"""What was measured of the cost of penalties, and the table that shows it."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table

from benchmarks.contenders import QUANTITIES, Contender
from benchmarks.report import ABSENT, add_number_columns, empty_table
from benchmarks.rounds import median_ratio

MEBIBYTE = 2**20

Penalty = tuple[str | None, int]


@dataclass(frozen=True)
class Cost:
    """The cost of training with one penalty, or with none.

    Attributes:
        mode: ``"merged"`` or ``"separate"``; None without a penalty.
        tasks: Number of consolidated tasks.
        milliseconds: Median over rounds of what was timed, by quantity.
        ratios: Median over rounds of the ratio to the same after the number of tasks that all are
            compared with, by quantity; empty without a penalty.
        rounds: Milliseconds in each round, by quantity.
        state_bytes: Size of the tensors that the penalty keeps.
        state_ratio: The same as a ratio; None without a penalty.
    """

    mode: str | None
    tasks: int
    milliseconds: dict[str, float]
    ratios: dict[str, float]
    rounds: dict[str, list[float]]
    state_bytes: int
    state_ratio: float | None


def summarise(
    medians: Mapping[Contender, list[float]], state_bytes: Mapping[Penalty, int], reference: int
) -> list[Cost]:
    """Put together what belongs to each penalty.

    Args:
        medians: Milliseconds in each round.
        state_bytes: Sizes by mode and number of tasks.
        reference: The number of tasks that others are compared with.

    Returns:
        A cost for plain training, and one for each penalty.
    """
    plain: Penalty = (None, 0)
    return [_summarise(medians, state_bytes, one, reference) for one in (plain, *state_bytes)]


def _summarise(
    medians: Mapping[Contender, list[float]],
    state_bytes: Mapping[Penalty, int],
    penalty: Penalty,
    reference: int,
) -> Cost:
    """Put together what belongs to one penalty."""
    mode, tasks = penalty
    rounds = {
        quantity: medians[Contender(quantity, mode, tasks)]
        for quantity in QUANTITIES
        if Contender(quantity, mode, tasks) in medians
    }
    return Cost(
        mode=mode,
        tasks=tasks,
        milliseconds={quantity: statistics.median(times) for quantity, times in rounds.items()},
        ratios={
            quantity: median_ratio(times, medians[Contender(quantity, mode, reference)])
            for quantity, times in rounds.items()
            if mode is not None
        },
        rounds=rounds,
        state_bytes=state_bytes.get(penalty, 0),
        state_ratio=state_bytes[penalty] / state_bytes[mode, reference] if mode else None,
    )


def cost_table(costs: Sequence[Cost], title: str) -> Table:
    """A row for plain training and for each penalty.

    Args:
        costs: What was measured.
        title: Stands above the table.

    Returns:
        A table for ``rich``; beside every number is its ratio to the reference.
    """
    table = empty_table(title)
    table.add_column("\nmode")
    add_number_columns(table, "\ntasks")
    for heading in (
        "penalty\n[ms]",
        "training\nstep [ms]",
        "RotatedAdam\nstep [ms]",
        "state\n[MiB]",
    ):
        add_number_columns(table, heading, "\nratio")
    for cost in costs:
        cells = [
            _shown(numbers.get(quantity))
            for quantity in QUANTITIES
            for numbers in (cost.milliseconds, cost.ratios)
        ]
        size = cost.state_bytes / MEBIBYTE
        state = [_shown(size if cost.mode else None), _shown(cost.state_ratio)]
        tasks = str(cost.tasks) if cost.mode else ABSENT
        table.add_row(cost.mode or "no penalty", tasks, *cells, *state)
    return table


def _shown(number: float | None) -> str:
    """A number, or a dash where there is none."""
    return ABSENT if number is None else f"{number:.2f}"
