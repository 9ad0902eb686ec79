"""The tables on the terminal, for ``rich``."""

from collections.abc import Sequence
from statistics import median

from rich.table import Table

from benchmarks.report.tables import ABSENT, MEBIBYTE, make_table
from benchmarks.speed import names
from benchmarks.speed.contenders import Kind
from benchmarks.speed.results import (
    MEASURED,
    REFUSED,
    Duration,
    Estimation,
    Result,
    Training,
)

WIDEST_MESSAGE = 100


def number(value: float | None, form: str) -> str:
    """A number, or a dash where there is none."""
    return ABSENT if value is None else f"{value:{form}}"


def estimation_table(record: Estimation, threads: int) -> Table:
    """A row for each contender."""
    part = "" if record.fraction == 1 else f" ({record.fraction:g} of the case)"
    title = (
        f"{record.case}: {names.CASES[record.case]}, {record.fisher}, {record.examples} examples"
        f"{part} in batches of {record.batch}; {_medians(record.rounds, threads)}"
    )
    numbers = ("median [s]", f"× {names.OURS}", "× floor", "peak [MiB]", "trace")
    leanest = _leanest(record)
    rows = []
    for one in record.results:
        # The floor is one for what this package computes.
        reaches = one.median is not None and one.kind in (Kind.SAME, Kind.MORE)
        rows.append(
            (
                one.name,
                number(one.median, ".3f"),
                number(one.ratio, ".2f"),
                number(one.median / record.floor if one.median and reaches else None, ".2f"),
                number(None if one.memory is None else one.memory / MEBIBYTE, ".0f"),
                number(one.value, ".5g"),
                "; ".join(filter(None, [_remark(one), "leanest" * (one.name == leanest)])),
            )
        )
    return make_table(title, ["contender"], numbers, rows, ["remarks"])


def floor_line(record: Estimation) -> str:
    """The floor and what it is made of."""
    parts = ", ".join(f"{name} {seconds:.3f}" for name, seconds in record.floor_seconds.items())
    return f"Floor: {record.floor:.3f} s ({parts})."


def training_table(record: Training, threads: int) -> Table:
    """A row for each contender."""
    title = (
        f"{record.case}: {names.STEP_CASES[record.case]}, {record.parameters:,} parameters, "
        f"batches of {record.batch}; {_medians(record.rounds, threads, record.repetitions)}"
    )
    rows = []
    for one in record.results:
        middle, *_ = one.range_over(record.scale) or (None,)
        milliseconds = one.median and 1_000 * one.median
        rows.append((one.name, number(milliseconds, ".3f"), number(middle, ".3f"), _remark(one)))
    return make_table(title, ["contender"], ["median [ms]", "× plain step"], rows, ["remarks"])


def compare(record: Training) -> dict[str, str]:
    """Ratios of penalties and steps to plain steps, peers and each other; overheads of steps."""
    found: dict[str, str] = {}

    def quotient(one: str, other: str, label: str = "") -> None:
        found[label or f"{one} / {other}"] = number(record.ratio(one, other), ".2f")

    penalties = {tasks: names.after(names.PENALTY, tasks) for tasks in record.tasks}
    for penalty in penalties.values():
        quotient(penalty, names.STEP)
    few, many = record.tasks[0], record.tasks[-1]
    if few < many:
        quotient(penalties[many], penalties[few], f"penalty, {many} / {few} tasks")
    ours = names.ours_beside_peers(record.case)
    quotient(ours, names.NNGEOMETRY)
    quotient(names.CURVLINOPS, ours)
    target = names.TARGETS.get(record.case)
    bound = f" (to be at most {target:g})" if target else ""
    quotient(names.ATTACHED, names.STEP, f"{names.ATTACHED} / {names.STEP}{bound}")
    for attached in (names.FINDING, names.GRADIENT, names.TANGENT):
        quotient(attached, names.STEP)
    for tasks in record.tasks:
        name = names.after(names.STEP_WITH_PENALTY, tasks)
        ratio = record.ratio(name, names.STEP)
        found[f"{name}: overhead"] = ABSENT if ratio is None else f"{100 * (ratio - 1):.1f} %"
    return found


def comparisons_table(record: Training) -> Table:
    """A row for each ratio and overhead of a case."""
    title = f"{record.case}: ratios within a round, medians over rounds"
    return make_table(title, ["comparison"], ["value"], compare(record).items())


def durations_table(durations: Sequence[Duration]) -> Table:
    """A row for each thing outside training."""
    rows = []
    for one in durations:
        own, other = median(one.seconds), median(one.other_seconds)
        rows.append((one.label, f"{own:.4f}", f"{one.other_label}: {other:.4f}"))
    return make_table("Outside training: medians", ["what"], ["seconds", "compared with"], rows)


def _medians(rounds: int, threads: int, calls: int | None = None) -> str:
    of_calls = "" if calls is None else f" of {calls} calls"
    return f"medians of {rounds} rounds{of_calls}, {threads} thread{'s' * (threads > 1)}"


def _leanest(record: Estimation) -> str | None:
    """Who takes the least memory, of at least two that compute the same."""
    found = {
        one.name: one.memory
        for one in record.results
        if one.memory is not None and one.kind == Kind.SAME and one.status == MEASURED
    }
    return min(found, key=lambda name: found[name]) if len(found) > 1 else None


def _remark(result: Result) -> str:
    """What is to be said of a contender, in a few words."""
    message = result.message
    if result.status == REFUSED:
        short = message if len(message) <= WIDEST_MESSAGE else f"{message[:WIDEST_MESSAGE]} …"
        return f"{REFUSED}: {short}"
    return message or ("" if result.status == MEASURED else result.status)
