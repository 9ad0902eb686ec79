"""The tables on the terminal, for ``rich``."""

from collections.abc import Iterable, Sequence

from rich.markup import escape
from rich.table import Table

from benchmarks.report.tables import ABSENT, MEBIBYTE, empty_table
from benchmarks.speed import names
from benchmarks.speed.comparisons import compare
from benchmarks.speed.contenders import Kind
from benchmarks.speed.outside import Duration
from benchmarks.speed.results import MEASURED, REFUSED, Estimation, Result, Training

WIDEST_MESSAGE = 100


def make_table(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table whose first and last columns hold words, and the others numbers."""
    table = empty_table(title)
    for place, heading in enumerate(headings):
        if place in (0, len(headings) - 1):
            table.add_column(heading, no_wrap=place == 0, overflow="fold")
        else:
            table.add_column(heading, justify="right", no_wrap=True)
    for cells in rows:
        table.add_row(*map(escape, cells))
    return table


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
    headings = ("\ncontender", "median\n[s]", f"× {names.OURS}\n", "× floor\n", "peak\n[MiB]")
    leanest = _leanest(record)
    rows = []
    for one in record.results:
        # The floor is one for what this package computes.
        reaches = one.median is not None and one.kind in (Kind.SAME.value, Kind.MORE.value)
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
    return make_table(title, (*headings, "\ntrace", "\nremarks"), rows)


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
    return make_table(title, ("\ncontender", "median\n[ms]", "× plain\nstep", "\nremarks"), rows)


def comparisons_table(record: Training) -> Table:
    """A row for each ratio and overhead of a case."""
    rows = []
    for one in compare(record):
        form, unit = (".1f", " %") if one.overhead else (".2f", "")
        value = ABSENT if one.value is None else f"{one.value:{form}}{unit}"
        target = "" if one.target is None else f"{one.relation} {one.target:{form}}{unit}"
        rows.append((one.label, value, target, verdict(one.met)))
    title = f"{record.case}: ratios within a round, medians over rounds"
    return make_table(title, ("comparison", "value", "target", ""), rows)


def durations_table(durations: Sequence[Duration]) -> Table:
    """A row for each thing outside training."""
    rows = []
    for one in durations:
        (own, other), limit = one.medians, one.limit
        beside = f"{one.other_label}: {other:.4f}"
        rows.append((one.label, f"{own:.4f}", beside, f"< {limit:.3g}", verdict(own < limit)))
    headings = ("what", "seconds", "beside it", "target", "")
    return make_table("Outside training: medians", headings, rows)


def verdict(met: bool | None) -> str:
    """Whether a target is met, in a word."""
    return "" if met is None else "met" if met else "missed"


def _medians(rounds: int, threads: int, calls: int | None = None) -> str:
    of_calls = "" if calls is None else f" of {calls} calls"
    return f"medians of {rounds} rounds{of_calls}, {threads} thread{'s' * (threads > 1)}"


def _leanest(record: Estimation) -> str | None:
    """Who takes the least memory, of at least two that compute the same."""
    found = {
        one.name: one.memory
        for one in record.results
        if one.memory is not None and one.kind == Kind.SAME.value and one.status == MEASURED
    }
    return min(found, key=lambda name: found[name]) if len(found) > 1 else None


def _remark(result: Result) -> str:
    """What is to be said of a contender, in a few words."""
    message = result.message
    if result.status == REFUSED:
        short = message if len(message) <= WIDEST_MESSAGE else f"{message[:WIDEST_MESSAGE]} …"
        return f"{REFUSED}: {short}"
    return message or ("" if result.status == MEASURED else result.status)
