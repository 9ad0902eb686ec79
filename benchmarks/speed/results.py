"""What was measured, and the file that keeps it.

The file holds the cells of several calls, if all were made on one machine with as many threads::

    {"format": "rotate_ewc.benchmarks.speed/1", "configuration": {...}, "cells": [...]}
"""

import dataclasses
import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.records import write_document
from benchmarks.speed import names

FORMAT = "rotate_ewc.benchmarks.speed/1"

MEASURED, WRONG, REFUSED, MISSING = "measured", "wrong", "refused", "not installed"


@dataclass(frozen=True)
class Result:
    """What was measured of one contender.

    Attributes:
        name: The contender.
        kind: What it can be compared with.
        version: Version of its package.
        status: One of :data:`MEASURED`, :data:`WRONG`, :data:`REFUSED`, :data:`MISSING`.
        message: Why it was refused, or how wrong it is; otherwise what it computes, if that is not
            what all do.
        seconds: Times in all rounds.
        traces: Traces in all estimations, the first of which has no time.
        memory: Bytes by which the first estimation raised the peak.
        ratio: Median over rounds of its time over this package's; None where the two are not
            comparable.
    """

    name: str
    kind: str
    version: str
    status: str
    message: str = ""
    seconds: list[float] = field(default_factory=list)
    traces: list[float] = field(default_factory=list)
    memory: int | None = None
    ratio: float | None = None

    @property
    def median(self) -> float | None:
        """Median time over rounds."""
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def trace(self) -> float | None:
        """Mean trace over estimations, whose sampled labels differ."""
        return statistics.fmean(self.traces) if self.traces else None


@dataclass(frozen=True)
class Cell:
    """One case with one Fisher type.

    Attributes:
        case: The case.
        fisher: The Fisher type.
        fraction: Part of the case's examples.
        examples: Number of examples.
        batch: Examples in a batch.
        rounds: Number of rounds.
        tolerance: Relative difference of traces up to which results count as equal.
        rates: Billions of operations per second in all rounds, by the shape of a product.
        eigh: Seconds of every ``eigh``, by size.
        gigaflop: Necessary operations by purpose, in billions.
        floor_seconds: What they take at least, by purpose.
        results: What was measured of each contender.
        versions: Versions of software.
    """

    case: str
    fisher: str
    fraction: float
    examples: int
    batch: int
    rounds: int
    tolerance: float
    rates: dict[str, list[float]]
    eigh: dict[str, list[float]]
    gigaflop: dict[str, float]
    floor_seconds: dict[str, float]
    results: list[Result]
    versions: dict[str, Any]

    @property
    def floor(self) -> float:
        """The least time that an estimation can take, in seconds."""
        return sum(self.floor_seconds.values())

    @property
    def place(self) -> tuple[str, str, float]:
        """What makes it another cell than others."""
        return self.case, self.fisher, self.fraction

    def times_floor(self, result: Result) -> float | None:
        """A median time as a multiple of the floor."""
        return None if result.median is None else result.median / self.floor


def merge(old: Iterable[Cell], new: Iterable[Cell]) -> list[Cell]:
    """Put cells together, the new ones in place of old ones of the same case, type and fraction.

    Args:
        old: Cells of earlier calls.
        new: Cells of this call.

    Returns:
        Cells in the order of the cases.
    """
    cells = {cell.place: cell for cell in (*old, *new)}
    cases, fishers = list(names.CASES), list(names.FISHERS)

    def order(cell: Cell) -> tuple[int, int, float]:
        return cases.index(cell.case), fishers.index(cell.fisher), -cell.fraction

    return sorted(cells.values(), key=order)


def write_cells(path: Path, configuration: dict[str, Any], cells: Iterable[Cell]) -> None:
    """Write a file that is, at every moment, the old one or the new one.

    Args:
        path: The JSON file; its folder must exist.
        configuration: What all cells have in common.
        cells: All cells of the file, not only new ones.
    """
    document = {"format": FORMAT, "configuration": configuration, "cells": list(map(_plain, cells))}
    write_document(path, document)


def _plain(cell: Cell) -> dict[str, Any]:
    """A cell as plain values, with numbers that can be computed from others for readers."""
    fields = dataclasses.asdict(cell)
    fields["floor"] = cell.floor
    for plain, result in zip(fields["results"], cell.results, strict=True):
        plain["median"] = result.median
        plain["times_floor"] = cell.times_floor(result)
    return fields


def read_cells(path: Path, configuration: dict[str, Any]) -> list[Cell]:
    """Read what :func:`write_cells` wrote.

    Args:
        path: The JSON file; there need be none.
        configuration: What its cells must have in common.

    Returns:
        The cells.

    Raises:
        ValueError: If the file is of another format or configuration.
    """
    if not path.exists():
        return []
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        document = None
    found = document.get("format") if isinstance(document, dict) else None
    if not isinstance(document, dict) or found != FORMAT:
        raise ValueError(f"{path} has the format {found!r}, expected {FORMAT!r}")
    if document["configuration"] != configuration:
        raise ValueError(
            f"{path} was measured with {document['configuration']}, which cannot be combined with "
            f"{configuration}; move it away or choose another folder"
        )
    return [_cell(fields) for fields in document["cells"]]


def _cell(fields: dict[str, Any]) -> Cell:
    """Make a cell of what :func:`_plain` returned."""
    return Cell(
        **{one.name: fields[one.name] for one in dataclasses.fields(Cell) if one.name != "results"},
        results=[
            Result(**{one.name: plain[one.name] for one in dataclasses.fields(Result)})
            for plain in fields["results"]
        ],
    )
