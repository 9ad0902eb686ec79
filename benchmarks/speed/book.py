"""The file that keeps what was measured, and its figure.

It holds the records of several calls, if all were made on one machine with as many threads::

    {"format": ..., "configuration": {...}, "records": [...], ...}
"""

import dataclasses
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

from benchmarks.command import CommandError, make_folder, replace_file, write_document
from benchmarks.report.style import image_of
from benchmarks.speed.figure import draw
from benchmarks.speed.results import Record

QUICK_WARNING = "A smoke test: a few examples, whose figures mean nothing."


class Book:
    """A JSON file of records with its figure, which at every moment are the old or the new ones."""

    def __init__(self, path: Path, kind: type[Record], *, threads: int, quick: bool) -> None:
        """Read what is there already, and say on what is measured."""
        make_folder(path.parent)
        self.path = path
        processor = f"{platform.machine()} ({torch.backends.cpu.get_cpu_capability()})"
        machine = {"processor": processor, "cpu_count": os.cpu_count()}
        self._configuration = {"threads": threads, "quick": quick, **machine}
        self.records: list[Any] = read(path, kind, self._configuration)
        line = (
            f"{processor}, {machine['cpu_count']} hardware threads; "
            f"PyTorch with {threads} thread{'s' * (threads > 1)}"
        )
        self._title = [line, *([QUICK_WARNING] if quick else [])]
        print("\n".join(self._title), flush=True)

    def add(self, record: Record) -> None:
        """Put a record in the place of the same old one, and write file and figure."""
        others: list[Any] = [one for one in self.records if one.place != record.place]
        self.records = sorted([*others, record], key=lambda one: one.place)
        self.write()
        replace_file(self.path.with_suffix(".png"), image_of(draw(self.records, self._title)))

    def write(self, **more: Sequence[Any]) -> None:
        """Write the file, with other lists of dataclasses if there are any."""
        lists = {"records": self.records, **more}
        document = {
            "format": self.records[0].format,
            "configuration": self._configuration,
            **{name: [dataclasses.asdict(one) for one in ones] for name, ones in lists.items()},
        }
        write_document(self.path, document)

    def close(self) -> None:
        """Say where everything is."""
        print(f"\nWrote {self.path} and {self.path.with_suffix('.png')}.")


def read(path: Path, kind: type[Record], configuration: Mapping[str, Any]) -> list[Any]:
    """Read the records of a file; CommandError if it is of another format or configuration."""
    if not path.exists():
        return []
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        document = None
    found = document.get("format") if isinstance(document, dict) else None
    if not isinstance(document, dict) or found != kind.format:
        raise CommandError(f"{path} has the format {found!r}, expected {kind.format!r}")
    if document["configuration"] != configuration:
        raise CommandError(
            f"{path} was measured with {document['configuration']}, which cannot be combined with "
            f"{configuration}; move it away or choose another folder"
        )
    return [msgspec.convert(fields, kind) for fields in document["records"]]
