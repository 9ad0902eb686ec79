"""The numbers of an experiment that tables and figures show, a row for each method."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import NamedTuple

from benchmarks.plots import is_own
from benchmarks.records import Record
from benchmarks.suite.protocol import Experiment, MethodResult
from benchmarks.suite.widths import Width, width_within


class Statistic(NamedTuple):
    """A mean over seeds.

    Attributes:
        mean: The mean.
        deviation: The sample standard deviation; None for a single seed.
        seeds: Number of seeds.
    """

    mean: float
    deviation: float | None
    seeds: int


def statistic(values: Iterable[float | None]) -> Statistic | None:
    """Summarise the values of several seeds; None where there are none or one is missing."""
    everything = list(values)
    known = [value for value in everything if value is not None]
    if not known or len(known) < len(everything):
        return None
    return Statistic(fmean(known), stdev(known) if len(known) > 1 else None, len(known))


@dataclass(frozen=True)
class SummaryRow:
    """What a method reached and what it cost; None wherever that is not known (yet).

    Attributes:
        label: Name of the method.
        own: Whether it is one of this package's.
        joint: Whether it is the upper bound, trained on all tasks at once.
        best: Whether none but the upper bound is more accurate.
        strength: The chosen λ.
        at_edge: Whether that is the smallest or largest that was tried.
        default: The default λ.
        diverged: Whether a run with the chosen λ diverged.
        accuracy: Average accuracy at the end with the chosen λ, a fraction.
        accuracy_at_default: The same with the default λ; None for methods without λ.
        forgetting: With the chosen λ, a fraction.
        backward_transfer: With the chosen λ, a fraction.
        training_seconds: With the chosen λ.
        relative_training: Training time as a multiple of naive training's.
        estimation_seconds: With the chosen λ.
        penalty_ms_per_step: With the chosen λ.
        state_bytes: With the chosen λ.
        search_runs: Number of runs in the search for λ.
        search_seconds: Wall time of the search, its runs taken one after another.
        width: Width of the optimum of λ.
    """

    label: str
    own: bool
    joint: bool
    best: bool
    strength: float | None
    at_edge: bool
    default: float | None
    diverged: bool
    accuracy: Statistic | None
    accuracy_at_default: Statistic | None
    forgetting: Statistic | None
    backward_transfer: Statistic | None
    training_seconds: Statistic | None
    relative_training: float | None
    estimation_seconds: Statistic | None
    penalty_ms_per_step: Statistic | None
    state_bytes: Statistic | None
    search_runs: int | None
    search_seconds: float | None
    width: Width | None


def summary_rows(experiment: Experiment) -> list[SummaryRow]:
    """Summarise an experiment.

    Args:
        experiment: Records sorted by the protocol; any of them may be missing.

    Returns:
        A row for each method, in the experiment's order.
    """
    highest = max(map(_rank, experiment.results), default=0.0)
    naive = next((one.tested for one in experiment.results if one.label == "naive"), [])
    naive_seconds = statistic(record.training_seconds for record in naive)
    return [
        _row(result, best=0.0 < highest == _rank(result), naive=naive_seconds)
        for result in experiment.results
    ]


def _rank(result: MethodResult) -> float:
    """What the best method is best in; zero for the upper bound, which competes with nobody."""
    if is_joint(result) or not result.tested:
        return 0.0
    return fmean(record.average_accuracy for record in result.tested)


def is_joint(result: MethodResult) -> bool:
    """Whether a method learned all tasks at once."""
    return any(record.trained_jointly for record in result.tested)


def _row(result: MethodResult, *, best: bool, naive: Statistic | None) -> SummaryRow:
    """Summarise the records of one method."""

    def tested(value: Callable[[Record], float | None]) -> Statistic | None:
        return statistic(map(value, result.tested))

    training = tested(lambda record: record.training_seconds)
    return SummaryRow(
        label=result.label,
        own=is_own(result.label),
        joint=is_joint(result),
        best=best,
        strength=result.strength,
        at_edge=result.at_edge,
        default=result.default,
        diverged=any(record.diverged for record in result.tested),
        accuracy=tested(lambda record: record.average_accuracy),
        accuracy_at_default=_accuracy_at_default(result),
        forgetting=tested(lambda record: record.forgetting),
        backward_transfer=tested(lambda record: record.backward_transfer),
        training_seconds=training,
        relative_training=training.mean / naive.mean if training and naive else None,
        estimation_seconds=tested(lambda record: record.estimation_seconds),
        penalty_ms_per_step=tested(lambda record: record.penalty_ms_per_step),
        state_bytes=tested(lambda record: record.state_bytes),
        search_runs=result.search_runs or None,
        search_seconds=result.search_seconds if result.search else None,
        width=width_within(result.search),
    )


def _accuracy_at_default(result: MethodResult) -> Statistic | None:
    """Accuracy with the default strength, of methods that have one."""
    if result.default is None:
        return None
    return statistic(record.average_accuracy for record in result.at_default)


def records_of(results: Sequence[MethodResult]) -> list[Record]:
    """All records that results were made from: each once, though some stand in two places."""
    found = {
        id(record): record
        for result in results
        for group in (*result.search.values(), result.tested, result.at_default)
        for record in group
    }
    return list(found.values())
