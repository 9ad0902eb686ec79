"""What one finished run leaves behind, and the JSON file that keeps it.

A file holds all runs of one scenario::

    {"format": "rotate_ewc.benchmarks/1", "scenario": "permuted_mnist", "records": [...]}

with one object per record, its keys being the fields of :class:`Record`.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.files import replace_file

FORMAT = "rotate_ewc.benchmarks/1"


@dataclass(frozen=True)
class Record:
    """The results of one method at one seed.

    Attributes:
        method: Name of the method, as given to ``--methods``.
        label: Name for tables and plots; differs from ``method`` where one method was run
            with several strengths.
        seed: Seed of the initial weights, the order of the batches and the tasks.
        average_accuracy: Mean accuracy over all tasks at the end, a fraction.
        forgetting: See :func:`benchmarks.metrics.forgetting`; None for joint training.
        backward_transfer: See :func:`benchmarks.metrics.backward_transfer`; None for joint
            training.
        accuracy_matrix: ``[T][T]``, row ``i`` the accuracies on all tasks after task ``i``.
            Joint training learns all tasks at once: its one row is repeated ``T`` times.
        training_seconds: Wall time of training with the penalty, without estimation and
            evaluation.
        estimation_seconds: Wall time of what the method does at the ends of tasks.
        penalty_ms_per_step: Milliseconds for the value and gradient of the penalty, after the
            last task; 0 where there is no penalty.
        state_bytes: Memory that the method holds between tasks, besides the network: anchors,
            importances, copies.
        spectra: For each block of a snapshot, after the last task, eigenvalues at some ranks; empty
            for methods without. See :func:`benchmarks.inspection.spectra`.
        trained_jointly: Whether all tasks were learned at once.
        configuration: The options of the run, data source and thread count.
        versions: Versions of the software, and the processor.
        diverged: Whether parameters, or squares of what the network computes, became infinite.
    """

    method: str
    label: str
    seed: int
    average_accuracy: float
    forgetting: float | None
    backward_transfer: float | None
    accuracy_matrix: list[list[float]]
    training_seconds: float
    estimation_seconds: float
    penalty_ms_per_step: float
    state_bytes: int
    spectra: dict[str, dict[str, list[float]]]
    trained_jointly: bool
    configuration: dict[str, Any]
    versions: dict[str, Any]
    diverged: bool = False

    @property
    def strength(self) -> float | None:
        """The λ of the run; None for methods that have none."""
        strength: float | None = self.configuration["strength"]
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
    """Collect the seeds of each method, methods in the order of their first record."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.label, []).append(record)
    return groups


def write_records(path: Path, scenario: str, records: Sequence[Record]) -> None:
    """Write all records to a file that is, at every moment, the old one or the new one.

    Args:
        path: The JSON file; its folder must exist.
        scenario: Name of the scenario, such as ``"permuted_mnist"``.
        records: All records of the file, not only new ones.

    Raises:
        ValueError: If a number is not finite, which JSON cannot hold.
    """
    document = {
        "format": FORMAT,
        "scenario": scenario,
        "records": [dataclasses.asdict(record) for record in records],
    }
    write_document(path, document)


def write_document(path: Path, document: Mapping[str, Any]) -> None:
    """Write JSON to a file that is, at every moment, the old one or the new one.

    Args:
        path: The file; its folder must exist.
        document: Plain values.

    Raises:
        ValueError: If a number is not finite, which JSON cannot hold.
    """
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    replace_file(path, text)


def read_records(path: Path) -> tuple[str, list[Record]]:
    """Read what :func:`write_records` wrote.

    Args:
        path: The JSON file.

    Returns:
        The name of the scenario, and the records.

    Raises:
        ValueError: If the file is of another format.
    """
    document = json.loads(path.read_text(encoding="utf-8"))
    found = document.get("format") if isinstance(document, dict) else None
    if found != FORMAT:
        raise ValueError(f"{path}: got the format {found!r}, expected {FORMAT!r}")
    return document["scenario"], [Record(**fields) for fields in document["records"]]
