"""One file for every run, found again by what determines its result.

A file's name ends in a digest of all options that can change the result, so that an interrupted
sweep goes on where it stopped, and never takes the record of another setting for its own.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.configuration import Configuration
from benchmarks.methods import Variant
from benchmarks.records import Record, read_records, write_records

# Options of the command line that a single run does not depend on. The number of threads changes
# time and rounding: a sweep may go on with another.
NOT_OF_A_RUN = ("methods", "seeds", "ewc_lambda", "baseline_ewc_lambda", "threads")
DIGEST_LENGTH = 10


@dataclass(frozen=True)
class Job:
    """One run that is to be done.

    Attributes:
        variant: The method and its strength.
        seed: Seed of the run.
        configuration: The options, among them whether to validate.
        scenario: Name of the results, such as ``"split_mnist_task"``.
        data_source: Where the images are from, such as ``"mnist"``.
    """

    variant: Variant
    seed: int
    configuration: Configuration
    scenario: str
    data_source: str

    def __str__(self) -> str:
        """Method, strength, seed and purpose, for messages."""
        strength = "" if self.variant.strength is None else f", λ = {self.variant.strength:g}"
        purpose = "search" if self.configuration.validate else "test"
        return f"{self.scenario}, {purpose}: {self.variant.label}{strength}, seed {self.seed}"

    @property
    def identity(self) -> dict[str, Any]:
        """All that determines the result."""
        options = self.configuration.as_dict()
        return {
            **{name: value for name, value in options.items() if name not in NOT_OF_A_RUN},
            "method": self.variant.name,
            "strength": self.variant.strength,
            "seed": self.seed,
            "data": self.data_source,
        }

    def path(self, folder: Path) -> Path:
        """Where the record is kept, inside a folder of results."""
        text = json.dumps(self.identity, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:DIGEST_LENGTH]
        purpose = "search" if self.configuration.validate else "test"
        strength = "" if self.variant.strength is None else f"_{self.variant.strength:g}"
        name = f"{self.variant.name}{strength}_seed{self.seed}_{purpose}_{digest}.json"
        return folder / self.scenario / name


def load(job: Job, folder: Path) -> Record | None:
    """The record of a job, if it has been done.

    Args:
        job: The job.
        folder: Folder of the results.

    Returns:
        The record; None where there is none, or a file that is damaged or older than the format.
    """
    try:
        _, (record,) = read_records(job.path(folder))
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return record


def save(record: Record, job: Job, folder: Path) -> None:
    """Keep the record of a job; the file is never half written.

    Args:
        record: The record.
        job: The job.
        folder: Folder of the results.
    """
    path = job.path(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_records(path, job.scenario, [record])


def load_all(folders: Iterable[Path]) -> list[tuple[str, Record]]:
    """All records in some folders and their subfolders.

    Args:
        folders: The folders, or single files.

    Returns:
        Pairs of a scenario's name and a record.

    Raises:
        ValueError: If a folder does not exist, or there is no record in any.
    """
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
