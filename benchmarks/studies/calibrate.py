"""``study-calibrate``: measure λ on the first two tasks of permuted MNIST."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

from benchmarks.command import keep, print_table, start
from benchmarks.configuration import Configuration, StreamOptions
from benchmarks.methods import Variant
from benchmarks.option_types import PositiveOrZero, described, one_of, several, whole_number

if TYPE_CHECKING:
    from torch import Tensor

    from benchmarks.results import Record
    from benchmarks.scenarios import Scenario
    from rotate_ewc import EKFACPenalty

NAME = "calibrate"
FORMAT = "rotate_ewc.benchmarks.calibrate/2"
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
    a part in it. The accuracies that are printed with it are those on the test images of the two
    tasks, or with --validate on training images that are held out. Writes calibrate.json (after
    every finished run), and prints a table.

    Attributes:
        methods: Which to run.
        tasks: Two, and no other number.
        ewc_lambda: Strength with which the second task is trained.
    """

    tasks: Annotated[int, whole_number(2, 2)] = 2
    methods: RotatedNames = METHODS[:1]
    ewc_lambda: PositiveOrZero = 1.0


@dataclass(frozen=True)
class Calibration:
    """The results of one method at one seed."""

    strength: float  # the calibrated λ
    old_images: int  # training images of the first task that it was measured on
    record: "Record"  # its own ``"strength"`` is the λ of the second task's training


def run(options: Options) -> int:
    """Calibrate every method at every seed, and present the results."""
    configuration, images, streams = start(options)
    results = options.output / f"{NAME}.json"
    runs = (
        calibrate(Variant(name, options.ewc_lambda), stream, configuration, seed=seed)
        for seed, stream in streams
        for name in options.methods
    )
    calibrations = keep(runs, results, {"format": FORMAT})
    title = f"{images}: two tasks, the second with λ = {options.ewc_lambda:g}"
    headings = ("seed", "calibrated λ", "first task [%]", "second task [%]")
    print_table(title, ["method"], headings, rows_of(calibrations))
    print(f"Wrote {results}.")
    return 0


def rows_of(calibrations: Iterable[Calibration]) -> Iterator[tuple[str, ...]]:
    """A row for every seed of every method, and one for the medians where there are several.

    Harm over predicted harm is a quotient of two small numbers, and its mean no steady thing.
    """
    groups: dict[str, list[Calibration]] = {}
    for calibration in calibrations:
        groups.setdefault(calibration.record.method, []).append(calibration)
    for method, group in groups.items():
        rows = [(str(one.record.seed), [one]) for one in group]
        for seed, some in [*rows, ("median", group)] if len(group) > 1 else rows:
            ends = [one.record.accuracy_matrix[-1] for one in some]
            accuracies = (f"{100 * median(end[task] for end in ends):.2f}" for task in range(2))
            yield method, seed, f"{median(one.strength for one in some):.2f}", *accuracies


def calibrate(
    variant: Variant, scenario: "Scenario", configuration: Configuration, *, seed: int
) -> Calibration:
    """Train two tasks and measure λ at the end of the second, before it is consolidated.

    What is left of proximal steps, where their interval does not divide the number of steps, is
    taken when the second task is consolidated, and so after the measurement.
    """
    from benchmarks import experiment
    from benchmarks.avalanche_names import SupervisedPlugin
    from rotate_ewc import calibrated_strength

    old_data = first_images(scenario)
    strengths: list[float] = []

    class Measurement(SupervisedPlugin, supports_distributed=True):  # type: ignore[misc, call-arg]
        def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
            penalty = penalty_of(strategy)
            if penalty.num_tasks == 1:
                loss_fn = strategy._criterion
                strengths.append(calibrated_strength(penalty, strategy.model, loss_fn, old_data))

    plugins = [Measurement()]
    record = experiment.run(variant, scenario, configuration, seed=seed, extra_plugins=plugins)
    return Calibration(strengths[0], sum(len(labels) for _, labels in old_data), record)


def penalty_of(strategy: Any) -> "EKFACPenalty":
    """The penalty of the rotated method among a strategy's plugins."""
    from rotate_ewc.integrations.avalanche import RotatedEWCPlugin

    (plugin,) = (found for found in strategy.plugins if isinstance(found, RotatedEWCPlugin))
    penalty: EKFACPenalty = plugin.penalty
    return penalty


def first_images(scenario: "Scenario") -> "list[tuple[Tensor, Tensor]]":
    """The first :data:`OLD_IMAGES` training images of the first task, or all, in batches."""
    import torch
    from torch.utils.data import DataLoader, Subset

    dataset: Any = scenario.training_sets()[0]
    rows = range(min(OLD_IMAGES, len(dataset)))
    loader = DataLoader(Subset(dataset, rows), batch_size=OLD_BATCH_SIZE)
    return [(inputs, torch.as_tensor(labels)) for inputs, labels in loader]
