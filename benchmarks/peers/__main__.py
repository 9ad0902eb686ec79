"""Measure what this package and others make of layers, losses and data.

Run ``python -m benchmarks.peers --help`` for the options.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.option_types import one_of, several

if TYPE_CHECKING:
    from benchmarks.peers.measure import Record
    from benchmarks.peers.row import Section

NAME = "peers"
FORMAT = "rotate_ewc.benchmarks.peers/1"
DESCRIPTION = """\
Ask this package and its peers for the Fisher matrices of tiny networks, one for every layer, loss
and feature, and compare them with exact dense matrices. Takes a few minutes.

Writes peers.json and prints the tables. A package that is not installed has cells that say so; all
of them come with: pip install '.[bench,peers]'
"""
PACKAGES = ("rotate-ewc", "curvlinops-for-pytorch", "nngeometry", "kronfluence", "laplace-torch")
ALSO_RECORDED = ("torch",)
LOG_WIDTH = 180


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the measurements.

    Args:
        arguments: Words of the command line; None for those of the process.

    Returns:
        The exit code: 0, or 1 where something needed is missing.
    """
    options = _parser().parse_args(arguments)
    if not find_spec("rich"):
        return _complain("something is missing; it comes with: pip install rich")
    packages = _chosen(options.packages, PACKAGES)
    from benchmarks.peers.table import SECTIONS

    names = [row.name for section in SECTIONS for row in section.rows]
    unknown = [name for name in _chosen(options.rows, ()) if name not in names]
    if unknown:
        return _complain(f"--rows: expected some of {', '.join(names)}, got {unknown[0]!r}")
    rows = _chosen(options.rows, names)
    if options.write is not None and (len(packages), len(rows)) != (len(PACKAGES), len(names)):
        return _complain("--write: the document holds all packages and rows, not a choice of them")
    try:
        _run(packages, rows, options.output, options.write)
    except (OSError, ValueError) as error:
        return _complain(str(error))
    return 0


def _parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{NAME}",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--packages",
        type=several(one_of(PACKAGES)),
        nargs="+",
        metavar="NAME",
        help=f"any of {' '.join(PACKAGES)} (default: all)",
    )
    parser.add_argument(
        "--rows",
        type=several(str),
        nargs="+",
        metavar="NAME",
        help="names of rows, as in the JSON file (default: all)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("results"),
        metavar="FOLDER",
        help="where peers.json goes (default: results)",
    )
    parser.add_argument(
        "--write",
        type=Path,
        metavar="FILE",
        help="Markdown document to renew between its two markers, such as docs/layers.md",
    )
    return parser


def _chosen(given: list[list[str]] | None, default: Sequence[str]) -> list[str]:
    """Join the values of ``--option a,b c``, or take the default."""
    return list(default) if given is None else [word for group in given for word in group]


def _complain(message: str) -> int:
    """Say what prevents the benchmark from running, and return the exit code for it."""
    print(f"benchmarks.{NAME}: error: {message}", file=sys.stderr)
    return 1


def _run(packages: list[str], rows: list[str], output: Path, document: Path | None) -> None:
    """Measure, then write and print everything."""
    import torch
    from rich.console import Console

    from benchmarks.peers.document import markdown, replace_between_markers, write_document
    from benchmarks.peers.measure import measure
    from benchmarks.peers.report import tables
    from benchmarks.peers.table import ADAPTERS, SECTIONS

    if document is not None:  # before the minutes of measuring
        replace_between_markers(document.read_text(encoding="utf-8"), "")
    output.mkdir(parents=True, exist_ok=True)
    # Tensors this small only wait for each other.
    torch.set_num_threads(1)
    adapters = [adapter for adapter in ADAPTERS if adapter.package in packages]
    sections = _with_rows(SECTIONS, rows)
    records = []
    for section in sections:
        for row in section.rows:
            print(f"{section.title}: {row.name}", file=sys.stderr, flush=True)
            records += [record for adapter in adapters for record in measure(row, adapter)]
    versions = installed_versions()
    path = output / f"{NAME}.json"
    path.write_text(as_json(records, versions), encoding="utf-8")
    console = Console(width=None if sys.stdout.isatty() else LOG_WIDTH)
    for table in tables(sections, adapters, records, versions):
        console.print(table)
    written = [path]
    if document is not None:
        write_document(document, markdown(sections, adapters, records, versions))
        written.append(document)
    print(f"Wrote {' and '.join(map(str, written))}.")


def _with_rows(sections: "Sequence[Section]", rows: Sequence[str]) -> "list[Section]":
    """The sections with only some of their rows, and not those that are left without any."""
    kept = [
        dataclasses.replace(section, rows=tuple(row for row in section.rows if row.name in rows))
        for section in sections
    ]
    return [section for section in kept if section.rows]


def installed_versions() -> dict[str, str]:
    """Versions of the packages that are measured, where they are installed, and of PyTorch."""
    versions = {}
    for package in (*PACKAGES, *ALSO_RECORDED):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def as_json(records: "Sequence[Record]", versions: dict[str, str]) -> str:
    """The contents of the JSON file."""
    document = {
        "format": FORMAT,
        "versions": versions,
        "records": [dataclasses.asdict(record) for record in records],
    }
    return json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


if __name__ == "__main__":
    sys.exit(main())
