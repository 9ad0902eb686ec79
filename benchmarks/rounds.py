"""Durations to be compared: all contenders take turns, so that a machine's moods hit all alike."""

import statistics
import timeit
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from tqdm import tqdm

Name = TypeVar("Name")

WARM_UPS = 3


def time_in_rounds(
    contenders: Mapping[Name, Callable[[], object]],
    *,
    rounds: int,
    repetitions: int,
    warm_ups: int = WARM_UPS,
) -> dict[Name, list[float]]:
    """Time all contenders in every round.

    Args:
        contenders: What is timed, by name; those that are compared had best be neighbours.
        rounds: Number of rounds.
        repetitions: How often a contender is called in its turn.
        warm_ups: How often before that, without being timed.

    Returns:
        For each contender the median time of its turn in each round, in milliseconds.
    """
    order = list(contenders)
    medians: dict[Name, list[float]] = {name: [] for name in order}
    # disable=None: no bar unless standard error is a terminal
    for number in tqdm(range(rounds), desc="timing", unit="round", disable=None):
        # Every other round is backwards: a steady drift favours neither end.
        for name in order[:: -1 if number % 2 else 1]:
            work = contenders[name]
            timeit.timeit(work, number=warm_ups)
            seconds = timeit.repeat(work, number=1, repeat=repetitions)
            medians[name].append(1_000 * statistics.median(seconds))
    return medians


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """The median over rounds of the ratio of two contenders in the same round."""
    return statistics.median(map(float.__truediv__, numerators, denominators))
