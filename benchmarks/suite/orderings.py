"""Checks what must hold at any size: ours forget less than EWC, and EWC less than no method.

Absolute accuracies depend on the size of the data and the number of steps; orders do not.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from benchmarks.suite.protocol import Experiment

# From the best to the worst. Networks that must tell all classes apart without seeing them together
# forget under every penalty, so class-incremental streams are not asked.
ORDER = ("rotated-adam", "ewc", "naive")
UNORDERED_SUFFIX = "_class"


@dataclass(frozen=True)
class Ordering:
    """One comparison of two methods.

    Attributes:
        scenario: Name of the scenario.
        better: Method that should be ahead.
        worse: Method that should be behind.
        accuracies: Mean accuracies of both.
    """

    scenario: str
    better: str
    worse: str
    accuracies: tuple[float, float]

    @property
    def holds(self) -> bool:
        """Whether the first is ahead."""
        return self.accuracies[0] > self.accuracies[1]

    def __str__(self) -> str:
        """The comparison in words."""
        better, worse = (f"{accuracy:.2%}" for accuracy in self.accuracies)
        verdict = "" if self.holds else ": NOT SO"
        return f"{self.scenario}: {self.better} {better} > {self.worse} {worse}{verdict}"


def orderings(experiments: Sequence[Experiment]) -> list[Ordering]:
    """Compare neighbours of :data:`ORDER`, where both were run.

    Args:
        experiments: Results at the chosen strengths.

    Returns:
        A comparison for each pair and experiment.
    """
    found = []
    for experiment in experiments:
        if experiment.scenario.endswith(UNORDERED_SUFFIX):
            continue
        accuracy = {
            result.label: fmean(record.average_accuracy for record in result.tested)
            for result in experiment.results
            if result.tested
        }
        present = [name for name in ORDER if name in accuracy]
        for better, worse in pairwise(present):
            values = (accuracy[better], accuracy[worse])
            found.append(Ordering(experiment.scenario, better, worse, values))
    return found
