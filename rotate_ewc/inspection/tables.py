"""Snapshots as tables in the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from rotate_ewc.curvature.operator import EKFACLinearOperator
from rotate_ewc.inspection.comparison import Comparison
from rotate_ewc.inspection.snapshot_file import SnapshotFile
from rotate_ewc.inspection.summary import BlockSummary

SUMMARY_NOTES = """\
kept            eigenvectors of the sides of outputs and inputs, of as many as there are entries
rank            eigenvalues above the rounding error of the largest
effective rank  (Σλ)² / Σλ²: how many equal eigenvalues would be spread like these
condition       largest eigenvalue over the smallest that rank counts
bytes           in memory"""
COMPARISON_NOTES = """\
cosine   tr(AB) / (‖A‖ ‖B‖): 1 if they are proportional
k        A's effective rank
overlap  tr(P_A P_B) / k of the projections on the k leading eigenvectors: 1 for the same space
another form   other parameters in one block, or other sides: not comparable"""


def heading(file: SnapshotFile) -> Text:
    """Describe a file."""
    lines = [
        f"{file.path}: {_size(file.file_bytes)}, format {file.format}, written by {file.library}"
    ]
    if file.num_tasks is not None:
        terms = len(file.operators)
        lines.append(f"{_counted(file.num_tasks, 'task')} in {_counted(terms, 'term')}")
    lines += _listed("options", file.options.items())
    return Text("\n".join(lines))


def operator_heading(operator: EKFACLinearOperator, number: int | None) -> Text:
    """Describe an operator.

    Args:
        operator: The operator.
        number: The number of its term in the penalty, if there are several terms.
    """
    named = "" if number is None else f"term {number}: "
    lines = [
        f"{named}{operator.provenance}; {operator.shape[0]:,} parameters, "
        f"{str(operator.dtype).removeprefix('torch.')}"
    ]
    lines += _listed("estimated with", operator.provenance.settings.items())
    return Text("\n".join(lines))


def summary_table(rows: Sequence[BlockSummary]) -> Table:
    """Make a table of blocks."""
    table = Table(box=box.SIMPLE)
    table.add_column("block", overflow="fold")
    table.add_column("shapes", overflow="fold")
    for title in ("kept", "trace", "rank", "effective rank", "condition", "bytes"):
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(
            Text(row.label),
            ", ".join(_shape(shape) for shape in row.shapes),
            _kept(row.kept, row.form),
            f"{row.trace:.4g}",
            f"{row.rank:,}",
            f"{row.effective_rank:.1f}",
            f"{row.condition:.2g}",
            _size(row.nbytes),
        )
    if len(rows) > 1:
        table.add_section()
        total = sum(row.trace for row in rows), sum(row.nbytes for row in rows)
        table.add_row("all", "", "", f"{total[0]:.4g}", "", "", "", _size(total[1]))
    return table


def comparison_table(comparison: Comparison) -> Table:
    """Make a table that compares the blocks of two operators."""
    table = Table(box=box.SIMPLE)
    table.add_column("block", overflow="fold")
    for title in ("kept A", "kept B", "trace B / A", "cosine", "k", "overlap"):
        table.add_column(title, justify="right")
    for row in comparison.blocks:
        table.add_row(
            Text(row.label),
            *(_kept(ranks, row.form) for ranks in row.kept),
            f"{row.trace_ratio:.4g}",
            f"{row.cosine:.4f}",
            f"{row.dimension:,}",
            f"{row.overlap:.4f}",
        )
    for labels, why in (
        (comparison.different, "another form"),
        (comparison.only_first, "only in A"),
        (comparison.only_second, "only in B"),
    ):
        for label in labels:
            table.add_row(Text(label), why, "", "", "", "", "")
    return table


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _listed(title: str, items: Iterable[tuple[str, object]]) -> list[str]:
    listed = ", ".join(f"{name} {value}" for name, value in items)
    return [f"{title}: {listed}"] if listed else []


def _kept(ranks: Sequence[int], form: Sequence[int]) -> str:
    """Format how many directions of each side are kept, as `kept/all` unless all are."""
    sides = zip(ranks, form[-2:], strict=True)
    return " × ".join(f"{rank}" if rank == size else f"{rank}/{size}" for rank, size in sides)


def _shape(shape: Sequence[int]) -> str:
    return " × ".join(map(str, shape)) or "scalar"


def _size(num_bytes: int) -> str:
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if num_bytes >= 2**power:
            return f"{num_bytes / 2**power:.1f} {unit}"
    return f"{num_bytes} B"
