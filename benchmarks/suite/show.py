"""``compare``, ``plot`` and ``report``: present what runs have reached."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from benchmarks.command import CommandError, make_console, make_folder
from benchmarks.option_types import Folder


@dataclass(frozen=True)
class Compare:
    """Print a table of what the runs in some folders have reached.

    Attributes:
        folders: Folders of results, with all folders in them.
    """

    folders: tyro.conf.Positional[tuple[Path, ...]] = (Path("results"),)


@dataclass(frozen=True)
class Plot(Compare):
    """Draw what the runs in some folders have reached.

    Attributes:
        output: Where to write.
    """

    output: Folder = Path("plots")


@dataclass(frozen=True)
class Report(Compare):
    """Write one page with all tables and figures, as HTML and Markdown.

    Attributes:
        output: Where to write.
    """

    output: Folder = Path("report")


def run(options: Compare | Plot | Report) -> int:
    """Present the results."""
    from benchmarks.report.page import write_figures, write_report
    from benchmarks.report.tables import terminal_notes, terminal_table
    from benchmarks.results import load_all
    from benchmarks.suite.outcome import experiments

    try:
        found = experiments(load_all(options.folders or (Path("results"),)))
    except ValueError as error:
        raise CommandError(str(error)) from error
    if not isinstance(options, Plot | Report):
        make_console().print(*map(terminal_table, found), terminal_notes())
        return 0
    make_folder(options.output)
    write = write_report if isinstance(options, Report) else write_figures
    for path in write(found, options.output):
        print(f"Wrote {path}")
    return 0
