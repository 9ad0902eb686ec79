"""One run in which the penalty goes through a file between any two tasks."""

import copy
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from benchmarks.avalanche_names import SupervisedPlugin
from benchmarks.configuration import Configuration
from benchmarks.methods import Variant
from benchmarks.runner import run
from benchmarks.scenarios import Scenario
from rotate_ewc import EKFACPenalty
from rotate_ewc.integrations.avalanche import RotatedEWCPlugin

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Stored:
    """The results of one method at one precision and seed.

    Attributes:
        method: Name of the method, as given to ``--methods``.
        precision: A key of :data:`PRECISIONS`: what bases and eigenvalues were stored in.
        seed: Seed of the initial weights, the order of the batches and the tasks.
        average_accuracy: Over all tasks, after the last.
        file_bytes: Size of the last file.
        penalty_errors: What storing changed of the penalty's value at the end of each task but the
            first, relative to the value.
        save_seconds: What each saving took.
        load_seconds: What each loading took.
        configuration: The options of the run, data source and thread count.
        versions: Versions of the software, and the processor.
    """

    method: str
    precision: str
    seed: int
    average_accuracy: float
    file_bytes: int
    penalty_errors: list[float]
    save_seconds: list[float]
    load_seconds: list[float]
    configuration: dict[str, Any]
    versions: dict[str, Any]


@dataclass
class StoragePlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[misc, call-arg]
    """Replaces what the penalty has learned by what a file holds of it, before every task.

    Attributes:
        path: The file.
        dtype: What bases and eigenvalues are stored in.
        file_bytes: Size of the last file.
        penalty_errors: As in :class:`Stored`.
        save_seconds: As in :class:`Stored`.
        load_seconds: As in :class:`Stored`.
    """

    path: Path
    dtype: torch.dtype | None
    file_bytes: int = 0
    penalty_errors: list[float] = field(default_factory=list)
    save_seconds: list[float] = field(default_factory=list)
    load_seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Begin without a penalty."""
        super().__init__()
        self._whole: EKFACPenalty | None = None

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Save, load, and go on with what was loaded."""
        penalty = _penalty_of(strategy)
        if penalty.num_tasks == 0:
            return
        self._whole = copy.deepcopy(penalty)
        begin = perf_counter()
        penalty.save(self.path, dtype=self.dtype)
        middle = perf_counter()
        loaded = EKFACPenalty.load(self.path)
        self.load_seconds.append(perf_counter() - middle)
        self.save_seconds.append(middle - begin)
        self.file_bytes = self.path.stat().st_size
        penalty.load_state_dict(loaded.state_dict())

    @torch.no_grad()
    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Compare both penalties where the task has ended."""
        if self._whole is None:
            return
        whole = self._whole(strategy.model).item()
        stored = _penalty_of(strategy)(strategy.model).item()
        self.penalty_errors.append(abs(stored / whole - 1))


def _penalty_of(strategy: Any) -> EKFACPenalty:
    (plugin,) = (found for found in strategy.plugins if isinstance(found, RotatedEWCPlugin))
    penalty: EKFACPenalty = plugin.penalty
    return penalty


def run_stored(
    variant: Variant,
    scenario: Scenario,
    configuration: Configuration,
    *,
    precision: str,
    seed: int,
    data_source: str,
) -> Stored:
    """Learn all tasks, storing the penalty after each.

    Args:
        variant: A rotated method.
        scenario: The tasks, made with the same seed.
        configuration: The options.
        precision: A key of :data:`PRECISIONS`.
        seed: Seed of PyTorch's global random state, which is set.
        data_source: Where the images are from, for the record.

    Returns:
        The results.
    """
    with tempfile.TemporaryDirectory() as folder:
        storage = StoragePlugin(Path(folder) / "penalty.safetensors", PRECISIONS[precision])
        record = run(
            variant,
            scenario,
            configuration,
            seed=seed,
            data_source=data_source,
            extra_plugins=[storage],
        )
    last = record.accuracy_matrix[-1]
    return Stored(
        method=variant.name,
        precision=precision,
        seed=seed,
        average_accuracy=sum(last) / len(last),
        file_bytes=storage.file_bytes,
        penalty_errors=storage.penalty_errors,
        save_seconds=storage.save_seconds,
        load_seconds=storage.load_seconds,
        configuration=record.configuration,
        versions=record.versions,
    )
