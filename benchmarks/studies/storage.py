"""``study-storage``: what is lost where snapshots in files have fewer bits."""

import copy
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from benchmarks.command import keep, print_table, start
from benchmarks.configuration import Configuration, StreamOptions
from benchmarks.methods import METHODS, Variant, is_own
from benchmarks.option_types import some_of
from benchmarks.permuted_mnist import strength_of

if TYPE_CHECKING:
    from benchmarks.results import Record
    from benchmarks.scenarios import Scenario

NAME = "storage"
FORMAT = "rotate_ewc.benchmarks.storage/2"
PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class Options(StreamOptions):
    """Learn permuted-MNIST tasks, and take what the penalty has learned from a file after each.

    Once the file has all bits, and once bases and eigenvalues in bfloat16. Prints accuracies,
    sizes, and what the storing changed of the penalty's value at the end of a task. Writes
    storage.json (after every finished run), and prints a table.

    Attributes:
        methods: Which of this package's to run.
    """

    methods: Annotated[tuple[str, ...], some_of(filter(is_own, METHODS))] = ("rotated-ewc",)

    def __post_init__(self) -> None:
        """Refuse a single task."""
        if self.tasks == 1:
            raise ValueError(
                "--tasks: expected at least 2, got 1: what is stored serves later tasks"
            )


@dataclass(frozen=True)
class Stored:
    """The results of one method at one precision and seed."""

    precision: str  # one of :data:`PRECISIONS`: what bases and eigenvalues were stored in
    file_bytes: int  # size of the last file
    penalty_errors: list[float]  # relative, at the end of each task but the first
    record: "Record"


def run(options: Options) -> int:
    """Run every method at every seed and precision, and present the results."""
    configuration, images, streams = start(options)
    results = options.output / f"{NAME}.json"
    runs = (
        run_stored(
            Variant(name, strength_of(name, options)), stream, configuration, precision, seed
        )
        for seed, stream in streams
        for name in options.methods
        for precision in PRECISIONS
    )
    found = keep(runs, results, {"format": FORMAT})
    title = f"{images}: {configuration.tasks} tasks, the penalty stored after each"
    headings = ("accuracy [%]", "file [KiB]", "largest error of the penalty")
    print_table(title, ["method", "stored in"], headings, rows_of(found))
    print(f"Wrote {results}.")
    return 0


def rows_of(found: Iterable[Stored]) -> Iterator[tuple[str, ...]]:
    """A row for every method and precision."""
    from benchmarks.report.tables import percent

    groups: dict[tuple[str, str], list[Stored]] = {}
    for one in found:
        groups.setdefault((one.record.method, one.precision), []).append(one)
    for names, group in groups.items():
        yield (
            *names,
            percent(one.record.average_accuracy for one in group),
            f"{group[-1].file_bytes / 1024:.0f}",
            f"{max(error for one in group for error in one.penalty_errors):.1e}",
        )


def run_stored(
    variant: Variant,
    scenario: "Scenario",
    configuration: Configuration,
    precision: str,
    seed: int,
) -> Stored:
    """Learn all tasks, storing the penalty after each."""
    import torch

    from benchmarks import experiment
    from benchmarks.avalanche_names import SupervisedPlugin
    from rotate_ewc import EKFACPenalty
    from rotate_ewc.integrations.avalanche import RotatedEWCPlugin

    def penalty_of(strategy: Any) -> EKFACPenalty:
        (plugin,) = (one for one in strategy.plugins if isinstance(one, RotatedEWCPlugin))
        penalty: EKFACPenalty = plugin.penalty
        return penalty

    dtype = None if precision == "float32" else getattr(torch, precision)
    errors: list[float] = []
    sizes: list[int] = []

    class Storage(SupervisedPlugin, supports_distributed=True):  # type: ignore[misc, call-arg]
        whole: EKFACPenalty | None = None

        def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
            penalty = penalty_of(strategy)
            if penalty.num_tasks > 0:
                self.whole = copy.deepcopy(penalty)
                penalty.save(path, storage_dtype=dtype)
                sizes.append(path.stat().st_size)
                penalty.load_state_dict(EKFACPenalty.load(path).state_dict())

        @torch.no_grad()
        def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
            if self.whole is not None:
                penalty = penalty_of(strategy)
                stored = penalty(strategy.model).item()
                self.whole.strength = penalty.strength  # which may have been found since
                errors.append(abs(stored / self.whole(strategy.model).item() - 1))

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "penalty.safetensors"
        plugins = [Storage()]
        record = experiment.run(variant, scenario, configuration, seed=seed, extra_plugins=plugins)
    return Stored(precision, sizes[-1], errors, record)
