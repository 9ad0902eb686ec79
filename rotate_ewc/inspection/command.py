"""The command line: `python -m rotate_ewc inspect | diff`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console

from rotate_ewc.curvature.operator import EKFACLinearOperator
from rotate_ewc.errors import SnapshotError
from rotate_ewc.inspection import tables
from rotate_ewc.inspection.comparison import compare
from rotate_ewc.inspection.snapshot_file import SnapshotFile, read
from rotate_ewc.inspection.summary import summaries
from rotate_ewc.version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: The arguments; None takes those of the process.

    Returns:
        The exit status: 0, or 1 if a file cannot be used.
    """
    options = _parser().parse_args(arguments)
    try:
        options.run(options, Console())
    except (SnapshotError, OSError, ValueError) as error:
        print(f"python -m rotate_ewc: error: {error}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m rotate_ewc", description="Look into snapshot files. Nothing in them is run."
    )
    parser.add_argument("--version", action="version", version=f"rotate_ewc {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="inspect | diff")
    inspect = commands.add_parser(
        "inspect",
        help="show the blocks of a snapshot",
        description="Show the blocks of a snapshot file, an operator's or a penalty's.",
    )
    inspect.add_argument("file", metavar="FILE", help="a file that save() wrote")
    inspect.add_argument(
        "--plot",
        metavar="PICTURE",
        help="draw the spectra to this file (.png, .svg or .pdf; needs matplotlib)",
    )
    inspect.set_defaults(run=_inspect)
    diff = commands.add_parser(
        "diff",
        help="compare two snapshots",
        description="Compare two snapshot files block by block: traces, and the spaces that their "
        "leading eigenvectors span. If a penalty has several terms, the last one is compared.",
    )
    diff.add_argument("first", metavar="A", help="a file that save() wrote")
    diff.add_argument("second", metavar="B", help="another one")
    diff.set_defaults(run=_diff)
    return parser


def _inspect(options: argparse.Namespace, console: Console) -> None:
    file = read(options.file)
    console.print(tables.heading(file))
    several = len(file.operators) > 1
    for index, operator in enumerate(file.operators):
        console.print(tables.operator_heading(operator, index if several else None))
        console.print(tables.summary_table(summaries(operator)))
    console.print(tables.SUMMARY_NOTES, highlight=False)
    if options.plot is not None:
        _plot(file, options.plot)
        console.print(f"The spectra are in {options.plot}", markup=False, highlight=False)


def _plot(file: SnapshotFile, path: str) -> None:
    try:
        from rotate_ewc.inspection.figure import save_spectra
    except ModuleNotFoundError as error:
        raise ValueError(f"--plot needs {error.name}: pip install 'rotate-ewc[plot]'") from None
    save_spectra(_latest(file), f"Spectra of {file.path}", path)


def _diff(options: argparse.Namespace, console: Console) -> None:
    first, second = read(options.first), read(options.second)
    console.print(tables.heading(first), tables.heading(second), sep="\n")
    console.print(tables.comparison_table(compare(_latest(first), _latest(second))))
    console.print(tables.COMPARISON_NOTES, highlight=False)


def _latest(file: SnapshotFile) -> EKFACLinearOperator:
    if not file.operators:
        raise ValueError(f"{file.path!r} is of a penalty without tasks; expected at least one task")
    return file.operators[-1]
