"""``peers``: what this package and others make of layers, losses and data."""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from benchmarks.command import CommandError, make_console, make_folder, replace_file, write_document
from benchmarks.option_types import Folder, default, some_of
from benchmarks.peers.row import ROWS, SECTIONS

FORMAT = "rotate_ewc.benchmarks.peers/1"
PACKAGES = ("rotate-ewc", "curvlinops-for-pytorch", "nngeometry", "kronfluence", "laplace-torch")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure what this package and others make of layers, losses and data.

    Asks for the Fisher matrices of tiny networks, one for every layer, loss and feature, and
    compares them with exact dense matrices. Takes a few minutes. Writes peers.json and prints the
    tables. A package that is not installed has cells that say so; all of them come with:
    pip install '.[bench,peers]'

    Attributes:
        packages: Packages, by the names of their distributions.
        rows: Names of rows, as in the JSON file.
        output: Folder of the results.
        write: Markdown document to renew between its two markers, such as docs/layers.md.
    """

    packages: Annotated[tuple[str, ...], some_of(PACKAGES)] = PACKAGES
    rows: Annotated[tuple[str, ...] | None, some_of(ROWS), default("all")] = None
    output: Folder = Path("results")
    write: Path | None = None

    def __post_init__(self) -> None:
        """Check that a document gets everything."""
        if self.write is not None and (self.rows or len(self.packages) < len(PACKAGES)):
            raise ValueError(
                "--write: the document holds all packages and rows, not a choice of them; leave "
                "out --packages and --rows"
            )


def run(options: Options) -> int:
    """Measure, then write and print everything."""
    import torch
    from rich.markdown import Markdown

    from benchmarks.peers.adapters import PEERS
    from benchmarks.peers.document import markdown, replace_between_markers
    from benchmarks.peers.measure import measure

    if options.write is not None:  # before the minutes of measuring
        try:
            replace_between_markers(options.write.read_text(encoding="utf-8"), "")
        except (OSError, ValueError) as error:
            raise CommandError(f"--write: {error}") from error
    make_folder(options.output)
    # Tensors this small only wait for each other.
    torch.set_num_threads(1)
    adapters = [adapter for adapter in PEERS if adapter.package in options.packages]
    chosen = options.rows or tuple(ROWS)
    records = []
    for name, row in ROWS.items():
        if name in chosen:
            print(name, file=sys.stderr, flush=True)
            records += [record for adapter in adapters for record in measure(row, adapter)]
    versions = {peer.package: found for peer in PEERS if (found := peer.version()) is not None}
    path = options.output / "peers.json"
    document = {
        "format": FORMAT,
        "versions": {**versions, "torch": torch.__version__},
        "records": [dataclasses.asdict(record) for record in records],
    }
    write_document(path, document)
    parts = [
        dataclasses.replace(section, rows=rows)
        for section in SECTIONS
        if (rows := tuple(row for row in section.rows if row.name in chosen))
    ]
    text = markdown(parts, adapters, records, versions)
    make_console().print(Markdown(text))
    if options.write is not None:
        before = options.write.read_text(encoding="utf-8")
        replace_file(options.write, replace_between_markers(before, text))
    print(f"Wrote {' and '.join(str(one) for one in (path, options.write) if one is not None)}.")
    return 0
