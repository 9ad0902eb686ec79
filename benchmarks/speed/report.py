"""The table of one case."""

from rich.markup import escape
from rich.table import Table

from benchmarks.report import ABSENT, add_number_columns, empty_table
from benchmarks.speed import names
from benchmarks.speed.contenders import Kind
from benchmarks.speed.results import MEASURED, REFUSED, Cell, Result

MEBIBYTE = 2**20
WIDEST_MESSAGE = 100
QUICK_WARNING = "A smoke test: a few examples, whose figures mean nothing."


def cell_table(cell: Cell, threads: int) -> Table:
    """A row for each contender.

    Args:
        cell: What was measured.
        threads: CPU threads.

    Returns:
        A table for ``rich``.
    """
    table = empty_table(_title(cell, threads))
    table.add_column("\ncontender", no_wrap=True)
    add_number_columns(
        table, "median\n[s]", f"× {names.OURS}\n", "× floor\n", "peak\n[MiB]", "\ntrace"
    )
    table.add_column("\nremarks", overflow="fold")
    leanest = _leanest(cell)
    for result in cell.results:
        table.add_row(
            escape(result.name),
            _number(result.median, ".3f"),
            _number(result.ratio, ".2f"),
            _number(cell.times_floor(result) if _reaches_for_floor(result) else None, ".2f"),
            _number(None if result.memory is None else result.memory / MEBIBYTE, ".0f"),
            _number(result.trace, ".5g"),
            escape(_remarks(result, leanest)),
        )
    return table


def _title(cell: Cell, threads: int) -> str:
    """Say what was measured, and how."""
    part = "" if cell.fraction == 1 else f" ({cell.fraction:g} of the case)"
    return (
        f"{cell.case}: {names.CASES[cell.case]}, {cell.fisher}, {cell.examples} examples{part} in "
        f"batches of {cell.batch}; medians of {cell.rounds} rounds, "
        f"{threads} thread{'s' * (threads > 1)}"
    )


def floor_line(cell: Cell) -> str:
    """The floor and what it is made of."""
    parts = ", ".join(f"{name} {seconds:.3f}" for name, seconds in cell.floor_seconds.items())
    return f"Floor: {cell.floor:.3f} s ({parts})."


def _reaches_for_floor(result: Result) -> bool:
    """Whether the floor is one for what a contender computes."""
    return result.kind in (Kind.SAME.value, Kind.MORE.value)


def _leanest(cell: Cell) -> str | None:
    """Who takes the least memory, of at least two that compute the same."""
    found = {
        result.name: result.memory
        for result in cell.results
        if result.memory is not None
        and result.kind == Kind.SAME.value
        and result.status == MEASURED
    }
    return min(found, key=lambda name: found[name]) if len(found) > 1 else None


def _remarks(result: Result, leanest: str | None) -> str:
    """What is to be said of a contender, in a few words."""
    if result.status == REFUSED:
        message = result.message
        short = message if len(message) <= WIDEST_MESSAGE else f"{message[:WIDEST_MESSAGE]} …"
        return f"{REFUSED}: {short}"
    if result.status != MEASURED:
        return result.message or result.status
    return "; ".join(filter(None, [result.message, "leanest" * (result.name == leanest)]))


def _number(value: float | None, form: str) -> str:
    """A number, or a dash where there is none."""
    return ABSENT if value is None else f"{value:{form}}"
