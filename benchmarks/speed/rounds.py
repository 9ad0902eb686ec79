"""Times to be compared: contenders take turns, so that a machine's moods hit all of them alike."""

import statistics
import timeit
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

from tqdm import tqdm

Name = TypeVar("Name")

WARM_UPS = 3


def turns(contenders: Sequence[Name], rounds: int) -> Iterator[tuple[int, Name]]:
    """Whose turn it is in which round, from 1.

    Every other round runs backwards, so that a steady drift favours nobody.
    """
    for number in range(1, rounds + 1):
        for name in contenders if number % 2 else reversed(contenders):
            yield number, name


def time_in_rounds(
    contenders: Mapping[Name, Callable[[], object]],
    *,
    rounds: int,
    repetitions: int,
    warm_ups: int = WARM_UPS,
) -> dict[Name, list[float]]:
    """Time all contenders in every round, within this process."""
    medians: dict[Name, list[float]] = {name: [] for name in contenders}
    total = rounds * len(contenders)
    # disable=None: no bar unless standard error is a terminal
    bar = tqdm(turns(list(contenders), rounds), total=total, unit="turn", disable=None)
    for _, name in bar:
        timeit.timeit(contenders[name], number=warm_ups)
        seconds = timeit.repeat(contenders[name], number=1, repeat=repetitions)
        medians[name].append(statistics.median(seconds))
    return medians


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """The median over rounds of the ratio of two contenders in the same round."""
    return statistics.median(map(float.__truediv__, numerators, denominators))
