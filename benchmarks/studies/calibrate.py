"""``study-calibrate``: measure λ on the first two tasks of permuted MNIST."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

from benchmarks.command import keep, make_console, prepare, title_of
from benchmarks.configuration import Configuration, StreamOptions
from benchmarks.methods import Variant
from benchmarks.option_types import PositiveOrZero, described, one_of, several

if TYPE_CHECKING:
    from torch import Tensor

    from benchmarks.data import ImageData
    from benchmarks.scenarios import Scenario

NAME = "calibrate"
FORMAT = "rotate_ewc.benchmarks.calibrate/1"
METHODS = ("rotated-ewc", "rotated-ewc-proximal", "rotated-adam")
OLD_IMAGES = 10_000
OLD_BATCH_SIZE = 2_000

RotatedNames = Annotated[
    tuple[str, ...], several(one_of(METHODS, metavar="METHOD")), described("Any", METHODS)
]


@dataclass(frozen=True, kw_only=True)
class Options(StreamOptions):
    """Choose the strength λ for a stream of permuted-MNIST tasks from its first two tasks alone.

    The second is trained with --ewc-lambda; λ is how many times more harm it has done to the first
    than the penalty takes it to have done. Harm is the growth of the mean loss on the first task's
    first 10,000 training images (or all, where they are fewer); no test image and no later task has
    a part in it. The accuracies that are printed beside it are those on the test images of the two
    tasks, or with --validate on training images that are held out. Writes calibrate.json (after
    every finished run), and prints a table.

    Attributes:
        methods: Which to run.
        tasks: Two, and no other number.
        ewc_lambda: Strength with which the second task is trained.
    """

    tasks: Annotated[int, one_of(["2"])] = 2
    methods: RotatedNames = METHODS[:1]
    ewc_lambda: PositiveOrZero = 1.0


@dataclass(frozen=True)
class Calibration:
    """The results of one method at one seed.

    Attributes:
        method: Name of the method.
        seed: Seed of the initial weights, the order of the batches and the tasks.
        strength: The calibrated λ.
        old_images: Training images of the first task that it was measured on.
        accuracies: Accuracies on both tasks after the second, fractions.
        configuration: The options of the run, data source and thread count; ``"strength"`` is the
            λ of the calibration itself.
        versions: Versions of the software, and the processor.
    """

    method: str
    seed: int
    strength: float
    old_images: int
    accuracies: list[float]
    configuration: dict[str, Any]
    versions: dict[str, Any]


def run(options: Options) -> int:
    """Calibrate every method at every seed, and present the results."""
    from benchmarks.report.tables import add_number_columns, empty_table

    configuration, data = prepare(options)
    results = options.output / f"{NAME}.json"
    calibrations = keep(_calibrations(options, configuration, data), results, {"format": FORMAT})
    table = empty_table(f"{title_of(data)}: two tasks, the second with λ = {options.ewc_lambda:g}")
    table.add_column("\nmethod")
    headings = ("\nseed", "calibrated\nλ", "first task\n[%]", "second task\n[%]")
    add_number_columns(table, *headings)
    for row in rows_of(calibrations):
        table.add_row(*row)
    make_console().print(table)
    print(f"Wrote {results}.")
    return 0


def rows_of(calibrations: Iterable[Calibration]) -> Iterator[tuple[str, ...]]:
    """A row for every seed of every method, and one for the medians where there are several.

    Harm over predicted harm is a quotient of two small numbers, and its mean no steady thing.
    """
    groups: dict[str, list[Calibration]] = {}
    for calibration in calibrations:
        groups.setdefault(calibration.method, []).append(calibration)
    for method, group in groups.items():
        several_seeds = [("median", group)] if len(group) > 1 else []
        for seed, some in [*((str(one.seed), [one]) for one in group), *several_seeds]:
            strength = median(one.strength for one in some)
            accuracies = (100 * median(one.accuracies[task] for one in some) for task in range(2))
            yield method, seed, f"{strength:.2f}", *(f"{value:.2f}" for value in accuracies)


def _calibrations(
    options: Options, configuration: Configuration, data: "ImageData"
) -> Iterator[Calibration]:
    """Calibrate all methods at one seed before the next."""
    from benchmarks.scenarios import PermutedImages

    for seed in options.seeds:
        scenario = PermutedImages(data, 2, seed)
        for name in options.methods:
            variant = Variant(name, options.ewc_lambda)
            yield calibrate(variant, scenario, configuration, seed=seed, data_source=data.source)


def calibrate(
    variant: Variant,
    scenario: "Scenario",
    configuration: Configuration,
    *,
    seed: int,
    data_source: str,
) -> Calibration:
    """Train two tasks and measure λ at the end of the second, before it is consolidated.

    What is left of proximal steps, where their interval does not divide the number of steps, is
    taken when the second task is consolidated, and so after the measurement.

    Args:
        variant: A rotated method, and the λ to train the second task with.
        scenario: Two tasks, made with the same seed.
        configuration: The options.
        seed: Seed of PyTorch's global random state, which is set.
        data_source: Where the images are from, for the record.

    Returns:
        The results.
    """
    from benchmarks import experiment
    from benchmarks.avalanche_names import SupervisedPlugin
    from benchmarks.inspection import penalty_of
    from rotate_ewc import calibrated_strength

    old_data = first_images(scenario)
    strengths: list[float] = []

    class Measurement(SupervisedPlugin, supports_distributed=True):  # type: ignore[misc, call-arg]
        def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
            penalty = penalty_of(strategy)
            if penalty.num_tasks == 1:
                harm = penalty, strategy.model, strategy._criterion, old_data
                strengths.append(calibrated_strength(*harm))

    record = experiment.run(
        variant,
        scenario,
        configuration,
        seed=seed,
        data_source=data_source,
        extra_plugins=[Measurement()],
    )
    return Calibration(
        method=variant.name,
        seed=seed,
        strength=strengths[0],
        old_images=sum(len(labels) for _, labels in old_data),
        accuracies=record.accuracy_matrix[-1],
        configuration=record.configuration,
        versions=record.versions,
    )


def first_images(scenario: "Scenario") -> "list[tuple[Tensor, Tensor]]":
    """The first :data:`OLD_IMAGES` training images of the first task, or all, in batches."""
    import torch
    from torch.utils.data import DataLoader, Subset

    dataset: Any = scenario.training_sets()[0]
    rows: Sequence[int] = range(min(OLD_IMAGES, len(dataset)))
    loader = DataLoader(Subset(dataset, rows), batch_size=OLD_BATCH_SIZE)
    return [(inputs, torch.as_tensor(labels)) for inputs, labels in loader]
