"""The tables of a case, and of what takes time outside training."""

from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from benchmarks.report import ABSENT, add_number_columns, empty_table
from benchmarks.speed.penalty import names
from benchmarks.speed.penalty.comparisons import OVERHEAD, Comparison, relative_range
from benchmarks.speed.penalty.results import Duration, Record
from benchmarks.speed.report import WIDEST_MESSAGE


def times_table(record: Record, threads: int) -> Table:
    """A row for each contender.

    Args:
        record: What was measured of a case.
        threads: CPU threads.

    Returns:
        A table for ``rich``.
    """
    table = empty_table(
        f"{record.case}: {names.CASES[record.case]}, {record.parameters:,} parameters, batches of "
        f"{record.batch}; medians of {len(record.rounds[names.STEP])} rounds of "
        f"{record.repetitions} calls, {threads} thread{'s' * (threads > 1)}"
    )
    table.add_column("\ncontender", no_wrap=True)
    add_number_columns(table, "median\n[ms]", "× plain\nstep")
    table.add_column("\nremarks", overflow="fold")
    for name, milliseconds in record.milliseconds.items():
        times = f"{relative_range(record.rounds, name)[1]:.3f}"
        table.add_row(escape(name), f"{milliseconds:.3f}", times, escape(_remark(record, name)))
    for name in record.statuses:
        if name not in record.rounds:
            table.add_row(escape(name), ABSENT, ABSENT, escape(_remark(record, name)))
    return table


def _remark(record: Record, name: str) -> str:
    """What is to be said of a contender, in a few words."""
    message = record.messages.get(name, "")
    if name in record.rounds:
        return message
    short = message if len(message) <= WIDEST_MESSAGE else f"{message[:WIDEST_MESSAGE]} …"
    return ": ".join(filter(None, [record.statuses[name], short]))


def comparisons_table(record: Record) -> Table:
    """A row for each ratio and overhead.

    Args:
        record: What was measured of a case.

    Returns:
        A table for ``rich``.
    """
    table = empty_table(f"{record.case}: ratios within a round, medians over rounds")
    table.add_column("comparison", no_wrap=True)
    add_number_columns(table, "value", "target")
    table.add_column("")
    for one in record.comparisons:
        value = ABSENT if one.value is None else _shown(one, one.value)
        target = "" if one.target is None else f"{one.relation} {_shown(one, one.target)}"
        table.add_row(escape(one.label), value, target, verdict(one.met))
    return table


def _shown(comparison: Comparison, value: float) -> str:
    """A value with its unit."""
    return f"{value:.1f} %" if comparison.unit == OVERHEAD else f"{value:.2f}"


def verdict(met: bool | None) -> str:
    """Whether a target is met, in a word."""
    return "" if met is None else "met" if met else "missed"


def durations_table(durations: Sequence[Duration]) -> Table:
    """A row for each thing outside training.

    Args:
        durations: What was measured.

    Returns:
        A table for ``rich``.
    """
    table = empty_table("Outside training: medians")
    table.add_column("what", no_wrap=True)
    add_number_columns(table, "seconds")
    table.add_column("beside it", no_wrap=True)
    add_number_columns(table, "seconds", "target")
    table.add_column("")
    for one in durations:
        limit = one.other_median if one.target is None else one.target
        table.add_row(
            escape(one.label),
            f"{one.median:.4f}",
            escape(one.other_label),
            f"{one.other_median:.4f}",
            f"< {limit:.3g}",
            verdict(one.met),
        )
    return table
