"""The rows of the table in words: ``rows.json`` holds titles, notes, and the tests that guard them.

Nothing here imports anything heavy; what is measured is in :mod:`benchmarks.peers.problems`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

Question = Literal["matrix", "pickle", "weights", "as found", "reduction"]


@dataclass(frozen=True)
class Note:
    """A footnote of a cell, so that a number is not read for more than it is."""

    text: str  # in Markdown
    # Whether the deviation is what the package documents or means, so that the cell says
    # "differs" and not "wrong".
    by_definition: bool = False


@dataclass(frozen=True)
class Row:
    """One layer, loss or feature."""

    name: str  # short identifier
    title: str  # for the table, in Markdown
    # What guards the row in this package: a file under ``tests`` and names in it, of tests or, in
    # ``helpers/cases``, of models or losses that the tests of exactness go through.
    tests: Mapping[str, tuple[str, ...]]
    notes: Mapping[str, Note]  # by package
    # Is the matrix right? Can the state be saved and read without pickle? Does loading it leave the
    # model's weights alone? Is the model as it was found? Is a loss without reduction refused?
    question: Question = "matrix"


@dataclass(frozen=True)
class Section:
    """Rows under a heading."""

    title: str
    rows: tuple[Row, ...]


def _read() -> tuple[Section, ...]:
    """Read the data file, in which rows have the names of notes."""
    text = Path(__file__).with_name("rows.json").read_text(encoding="utf-8")
    document: dict[str, Any] = json.loads(text)
    for section in document["sections"]:
        for row in section["rows"]:
            own = row.get("notes", {}).items()
            row["notes"] = {package: document["notes"][name] for package, name in own}
    return msgspec.convert(document["sections"], tuple[Section, ...])


SECTIONS = _read()
ROWS = {row.name: row for section in SECTIONS for row in section.rows}
