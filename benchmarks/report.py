"""The table at the end of a benchmark, and what other tables have in common with it."""

import statistics
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from benchmarks.records import Record, group_by_label

ABSENT = "–"


def results_table(records: Sequence[Record], title: str) -> Table:
    """Summarise records: a row per method, means over seeds, ± the sample standard deviation.

    Args:
        records: Results of any methods and seeds.
        title: Stands above the table.

    Returns:
        A table for ``rich``; accuracies in percent, differences of accuracies in percentage points.
    """
    table = empty_table(title)
    table.add_column("\n\nmethod", overflow="fold", min_width=8)
    add_number_columns(
        table,
        "average\naccuracy\n[%]",
        "\nforgetting\n[points]",
        "backward\ntransfer\n[points]",
        "\ntraining\n[s]",
        "\nestimation\n[s]",
        "\npenalty\n[ms/step]",
    )
    for label, group in group_by_label(records).items():
        table.add_row(
            escape(label),
            percent([record.average_accuracy for record in group]),
            percent([record.forgetting for record in group]),
            percent([record.backward_transfer for record in group]),
            f"{statistics.fmean(record.training_seconds for record in group):.1f}",
            f"{statistics.fmean(record.estimation_seconds for record in group):.2f}",
            f"{statistics.fmean(record.penalty_ms_per_step for record in group):.2f}",
        )
    return table


def empty_table(title: str) -> Table:
    """A table with few lines and little padding, so that much fits a terminal of 80 columns."""
    return Table(
        title=escape(title),
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,
    )


def add_number_columns(table: Table, *headings: str) -> None:
    """Add columns of numbers, whose headings are not broken into more lines than they have."""
    for heading in headings:
        widest = max(len(line) for line in heading.splitlines())
        table.add_column(escape(heading), justify="right", min_width=widest)


def percent(fractions: Sequence[float | None]) -> str:
    """Mean, and the deviation of two or more, in percent; a dash where a value is missing."""
    values = [100 * fraction for fraction in fractions if fraction is not None]
    if len(values) < len(fractions):
        return ABSENT
    mean = f"{statistics.fmean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.2f}"
