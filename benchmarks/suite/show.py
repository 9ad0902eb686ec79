"""``report``: present what runs have reached."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from benchmarks.command import CommandError, make_console, make_folder
from benchmarks.option_types import Folder


@dataclass(frozen=True)
class Options:
    """Print tables of what the runs in some folders have reached, and draw it.

    Writes one page with all tables and figures, as Markdown with PNG files.

    Attributes:
        folders: Folders of results, with all folders in them.
        output: Where to write.
    """

    folders: tyro.conf.Positional[tuple[Path, ...]] = (Path("results"),)
    output: Folder = Path("report")


def run(options: Options) -> int:
    """Present the results."""
    from benchmarks.report.page import write_report
    from benchmarks.report.tables import terminal_notes, terminal_table
    from benchmarks.results import load_all
    from benchmarks.suite.outcome import experiments

    try:
        found = experiments(load_all(options.folders or (Path("results"),)))
    except ValueError as error:
        raise CommandError(str(error)) from error
    make_folder(options.output)
    make_console().print(*map(terminal_table, found), terminal_notes())
    for path in write_report(found, options.output):
        print(f"Wrote {path}")
    return 0
