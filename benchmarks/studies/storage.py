"""``study-storage``: what snapshots in files cost, and what is lost where they have fewer bits."""

import copy
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

from benchmarks.command import keep, make_console, prepare, title_of
from benchmarks.configuration import Configuration, StreamOptions
from benchmarks.methods import Variant
from benchmarks.studies.calibrate import METHODS, RotatedNames

if TYPE_CHECKING:
    from benchmarks.data import ImageData
    from benchmarks.scenarios import Scenario

NAME = "storage"
FORMAT = "rotate_ewc.benchmarks.storage/1"
PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class Options(StreamOptions):
    """Learn permuted-MNIST tasks, and take what the penalty has learned from a file after each.

    Once the file has all bits, and once bases and eigenvalues in bfloat16. Prints accuracies,
    sizes, times, and what the storing changed of the penalty's value at the end of a task. Writes
    storage.json (after every finished run), and prints a table.

    Attributes:
        methods: Which to run.
    """

    methods: RotatedNames = METHODS[:1]

    def __post_init__(self) -> None:
        """Refuse a single task."""
        if self.tasks == 1:
            raise ValueError(
                "--tasks: expected at least 2, got 1: what is stored serves later tasks"
            )


@dataclass(frozen=True)
class Stored:
    """The results of one method at one precision and seed.

    Attributes:
        method: Name of the method.
        precision: One of :data:`PRECISIONS`: what bases and eigenvalues were stored in.
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
class Storage:
    """Puts a penalty into a file and takes it from there, and notes what that does.

    Attributes:
        path: The file.
        precision: One of :data:`PRECISIONS`.
        file_bytes: Size of the last file.
        penalty_errors: As in :class:`Stored`, and so the two that follow.
    """

    path: Path
    precision: str
    file_bytes: int = 0
    penalty_errors: list[float] = field(default_factory=list)
    save_seconds: list[float] = field(default_factory=list)
    load_seconds: list[float] = field(default_factory=list)

    def plugin(self) -> Any:
        """An Avalanche plugin that stores before every task, and compares after it."""
        import torch

        from benchmarks.avalanche_names import SupervisedPlugin
        from benchmarks.inspection import penalty_of
        from rotate_ewc import EKFACPenalty

        storage = self
        dtype = None if self.precision == "float32" else getattr(torch, self.precision)

        class Plugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[misc, call-arg]
            whole: EKFACPenalty | None = None

            def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
                penalty = penalty_of(strategy)
                if penalty.num_tasks == 0:
                    return
                self.whole = copy.deepcopy(penalty)
                begin = perf_counter()
                penalty.save(storage.path, dtype=dtype)
                middle = perf_counter()
                loaded = EKFACPenalty.load(storage.path)
                storage.load_seconds.append(perf_counter() - middle)
                storage.save_seconds.append(middle - begin)
                storage.file_bytes = storage.path.stat().st_size
                penalty.load_state_dict(loaded.state_dict())

            @torch.no_grad()
            def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
                if self.whole is not None:
                    whole = self.whole(strategy.model).item()
                    stored = penalty_of(strategy)(strategy.model).item()
                    storage.penalty_errors.append(abs(stored / whole - 1))

        return Plugin()


def run(options: Options) -> int:
    """Run every method at every seed and precision, and present the results."""
    from benchmarks.report.tables import add_number_columns, empty_table

    configuration, data = prepare(options)
    results = options.output / f"{NAME}.json"
    records = keep(_records(options, configuration, data), results, {"format": FORMAT})
    title = f"{title_of(data)}: {configuration.tasks} tasks, the penalty stored after each"
    table = empty_table(title)
    table.add_column("\nmethod")
    table.add_column("\nstored in")
    headings = ("accuracy\n[%]", "file\n[KiB]", "largest error\nof the penalty")
    add_number_columns(table, *headings, "save\n[ms]", "load\n[ms]")
    for row in rows_of(records):
        table.add_row(*row)
    make_console().print(table)
    print(f"Wrote {results}.")
    return 0


def rows_of(records: Iterable[Stored]) -> Iterator[tuple[str, ...]]:
    """A row for every method and precision."""
    from benchmarks.report.tables import percent

    groups: dict[tuple[str, str], list[Stored]] = {}
    for record in records:
        groups.setdefault((record.method, record.precision), []).append(record)
    for names, group in groups.items():
        yield (
            *names,
            percent(record.average_accuracy for record in group),
            f"{group[-1].file_bytes / 1024:.0f}",
            f"{max(error for record in group for error in record.penalty_errors):.1e}",
            f"{1_000 * median(s for record in group for s in record.save_seconds):.1f}",
            f"{1_000 * median(s for record in group for s in record.load_seconds):.1f}",
        )


def _records(options: Options, configuration: Configuration, data: "ImageData") -> Iterator[Stored]:
    """Run all methods and precisions at one seed before the next."""
    from benchmarks.scenarios import PermutedImages

    for seed in options.seeds:
        scenario = PermutedImages(data, configuration.tasks, seed)
        for name in options.methods:
            for precision in PRECISIONS:
                variant = Variant(name, options.ewc_lambda)
                yield run_stored(
                    variant, scenario, configuration, precision=precision, seed=seed, data=data
                )


def run_stored(
    variant: Variant,
    scenario: "Scenario",
    configuration: Configuration,
    *,
    precision: str,
    seed: int,
    data: "ImageData",
) -> Stored:
    """Learn all tasks, storing the penalty after each.

    Args:
        variant: A rotated method.
        scenario: The tasks, made with the same seed.
        configuration: The options.
        precision: One of :data:`PRECISIONS`.
        seed: Seed of PyTorch's global random state, which is set.
        data: The images, for the record.

    Returns:
        The results.
    """
    from benchmarks import experiment

    with tempfile.TemporaryDirectory() as folder:
        storage = Storage(Path(folder) / "penalty.safetensors", precision)
        record = experiment.run(
            variant,
            scenario,
            configuration,
            seed=seed,
            data_source=data.source,
            extra_plugins=[storage.plugin()],
        )
    return Stored(
        method=variant.name,
        precision=precision,
        seed=seed,
        average_accuracy=record.average_accuracy,
        file_bytes=storage.file_bytes,
        penalty_errors=storage.penalty_errors,
        save_seconds=storage.save_seconds,
        load_seconds=storage.load_seconds,
        configuration=record.configuration,
        versions=record.versions,
    )
