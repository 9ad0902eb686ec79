"""What finished runs leave behind: records, and the JSON files that keep them.

A file holds one or more runs of one scenario::

    {"format": "rotate_ewc.benchmarks/3", "scenario": "permuted_mnist", "records": [...]}

with one object per record, its keys being the fields of :class:`Record`. The suite keeps every run
in a file of its own, whose name ends in a digest of all options that can change the result: so an
interrupted sweep goes on where it stopped, and never takes the record of another setting for its
own.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.command import write_document
from benchmarks.configuration import Configuration
from benchmarks.methods import Variant

FORMAT = "rotate_ewc.benchmarks/3"
DIGEST_LENGTH = 10


@dataclass(frozen=True)
class Record:
    """The results of one method at one seed; times are wall times, accuracies fractions."""

    method: str  # name of the method, as given to ``--methods``
    label: str  # for tables and plots: the method, with what tells several runs of it apart
    seed: int  # seed of the initial weights, the order of the batches and the tasks
    average_accuracy: float  # mean over all tasks at the end
    forgetting: float | None  # None for joint training, as is the next
    backward_transfer: float | None
    accuracy_matrix: list[list[float]]  # ``[T][T]``; joint training has equal rows
    training_seconds: float  # with the penalty, without estimation and evaluation
    estimation_seconds: float  # what the method does at the ends of tasks
    state_bytes: int  # held between tasks, besides the network: anchors, importances, copies
    trained_jointly: bool
    configuration: dict[str, Any]  # the options of the run, data source and thread count
    versions: dict[str, Any]  # versions of the software, and the processor
    diverged: bool = False  # whether parameters, or squares of activations, became infinite

    @property
    def strength(self) -> float | str | None:
        """The λ of the run, or ``"auto"``; None for methods that have none."""
        strength: float | str | None = self.configuration["strength"]
        return strength

    @property
    def for_validation(self) -> bool:
        """Whether accuracies are those on held-out training images."""
        return bool(self.configuration["validate"])

    @property
    def seconds(self) -> float:
        """Wall time of training and of what the method does at the ends of tasks."""
        return self.training_seconds + self.estimation_seconds


def group_by_label(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Collect the records of each label, labels in the order of their first record."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.label, []).append(record)
    return groups


def read_records(path: Path) -> tuple[str, list[Record]]:
    """Read the scenario and the records of a file; ``ValueError`` if it has another format."""
    document = json.loads(path.read_text(encoding="utf-8"))
    found = document.get("format") if isinstance(document, dict) else None
    if found != FORMAT:
        raise ValueError(f"{path}: got the format {found!r}, expected {FORMAT!r}")
    return document["scenario"], [Record(**fields) for fields in document["records"]]


@dataclass(frozen=True)
class Job:
    """One run that is to be done."""

    variant: Variant
    seed: int
    configuration: Configuration  # the options, among them whether to validate
    scenario: str  # name of the results, such as ``"split_mnist_task"``
    data_source: str  # where the images are from, such as ``"mnist"``

    def __str__(self) -> str:
        """Method, strength, seed and purpose, for messages."""
        strength = "" if self.variant.strength is None else f", λ = {self._strength}"
        return f"{self.scenario}, {self._purpose}: {self.variant.label}{strength}, seed {self.seed}"

    @property
    def _strength(self) -> str:
        strength = self.variant.strength
        return f"{strength:g}" if isinstance(strength, float) else str(strength)

    @property
    def _purpose(self) -> str:
        return "search" if self.configuration.validate else "test"

    @property
    def identity(self) -> dict[str, Any]:
        """All that determines the result.

        The number of threads changes time and rounding: a sweep may go on with another.
        """
        return {
            **self.configuration.as_dict(),
            "method": self.variant.name,
            "strength": self.variant.strength,
            "seed": self.seed,
            "data": self.data_source,
        }

    def path(self, folder: Path) -> Path:
        """Where the record is kept, inside a folder of results."""
        text = json.dumps(self.identity, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:DIGEST_LENGTH]
        strength = "" if self.variant.strength is None else f"_{self._strength}"
        name = f"{self.variant.name}{strength}_seed{self.seed}_{self._purpose}_{digest}.json"
        return folder / self.scenario / name


def load(job: Job, folder: Path) -> Record | None:
    """The record of a job in a folder; None if there is none, or only a damaged or older file."""
    try:
        _, (record,) = read_records(job.path(folder))
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return record


def save(record: Record, job: Job, folder: Path) -> None:
    """Keep the record of a job in a folder; the file is never half written."""
    document = {"scenario": job.scenario, "records": [dataclasses.asdict(record)]}
    write_document(job.path(folder), {"format": FORMAT, **document})


def load_all(folders: Iterable[Path]) -> list[tuple[str, Record]]:
    """Scenarios and records in folders and below; ``ValueError`` if one is absent, or all empty."""
    found = []
    for path in dict.fromkeys(path.resolve() for path in _files(folders)):
        try:
            scenario, records = read_records(path)
        except (ValueError, TypeError, KeyError):  # other programs write JSON too
            continue
        found += [(scenario, record) for record in records]
    if not found:
        places = ", ".join(str(folder) for folder in folders)
        raise ValueError(
            f"got no record in {places}; expected a folder that "
            "`python -m benchmarks run` has written to"
        )
    return found


def _files(folders: Iterable[Path]) -> Iterator[Path]:
    """The JSON files in some folders, in an order that does not depend on the file system."""
    for folder in folders:
        if not folder.exists():
            raise ValueError(f"got {folder}, which does not exist; expected a folder of results")
        yield from [folder] if folder.is_file() else sorted(folder.rglob("*.json"))
