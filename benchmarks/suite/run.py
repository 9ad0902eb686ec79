"""``run``: search the strength of every method, then test it."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from benchmarks.command import CommandError, load, make_console, make_folder
from benchmarks.configuration import (
    IMAGES,
    INCREMENTS,
    SCENARIO_DEFAULTS,
    Configuration,
    DataRoot,
    MethodNames,
    Training,
    default_data_root,
)
from benchmarks.methods import METHODS
from benchmarks.option_types import (
    Count,
    CountOrZero,
    Folder,
    OptionalFolder,
    OptionalSeeds,
    Seeds,
    Threads,
    default,
    one_of,
    several,
    whole_number,
)

if TYPE_CHECKING:
    from benchmarks.suite.outcome import Experiment
    from benchmarks.suite.sweep import Pool

ALL = "all"
QUICK_SEARCH_VALUES = 3
# From the best to the worst. Networks that must tell all classes apart without seeing them together
# forget under every penalty, so class-incremental streams are not asked.
ORDER = ("rotated-ewc", "ewc", "naive")
UNORDERED_SUFFIX = "_class"

Scenario = Annotated[str, one_of((*SCENARIO_DEFAULTS, ALL), metavar="SCENARIO")]
Increments = Annotated[
    tuple[str, ...] | None,
    several(one_of(INCREMENTS, metavar="KIND")),
    default("all three, one after another"),
]


@dataclass(frozen=True, kw_only=True)
class Options(Training):
    """Search the strength of every method on held-out training images, then test it.

    Tests are made with several seeds, at the strength found and at the method's default. Every run
    is kept in a file of its own: a call that was interrupted goes on where it stopped when it is
    repeated, and a call with more seeds or methods adds to what is there.

    Attributes:
        scenario: One of permuted_mnist, rotated_mnist, split_mnist, split_images, all.
        increment: What the network is to tell in split streams: which class of a given task
            (task), of a task that is not given (domain), or of all (class).
        images: Folder of split_images, with train/CLASS and test/CLASS for every class, and images
            in each; they are scaled to 32 × 32 pixels.
        methods: Which to run.
        search_values: Powers of ten to try as strength of each method before the best is refined,
            an odd number; 0 for the default strength alone.
        search_seeds: Every strength is tried with each.
        quick: A small version of everything, in minutes: few images, few tasks, a coarse search;
            fails where the methods are not in the expected order.
        replay: Give every method a replay buffer of so many examples besides.
        training_images: Use the first N training images only, 0 for all.
        seeds: Every method is tested with each; a seed determines permutations and angles, the
            initial weights and the order of examples.
        jobs: Runs at the same time, each with its share of the processors; times are then those of
            a busy machine.
        data_root: Where the data are, or are downloaded to.
        output: Where results go.
        threads: CPU threads of PyTorch for each run.
    """

    scenario: tyro.conf.Positional[Scenario]
    increment: Increments = None
    images: Annotated[OptionalFolder, default("none: split_images is left out of all")] = None
    methods: MethodNames = tuple(METHODS)
    search_values: Annotated[int | None, whole_number(0), default("5; with --quick: 3")] = None
    search_seeds: Seeds = (0,)
    quick: bool = False
    replay: CountOrZero = 0
    training_images: Annotated[int | None, whole_number(0), default("0; with --quick: 6000")] = None
    seeds: Annotated[OptionalSeeds, default("0 1 2; with --quick: 0")] = None
    jobs: Count = 1
    data_root: DataRoot = field(default_factory=default_data_root)
    output: Folder = Path("results")
    threads: Threads = None

    def __post_init__(self) -> None:
        """Refuse combinations that make no sense."""
        if self.search_values and self.search_values % 2 == 0:
            raise ValueError(
                f"--search-values: expected an odd number or 0, got {self.search_values}: as many "
                "powers of ten below the middle as above"
            )
        if self.increment and not self.scenario.startswith(("split", ALL)):
            raise ValueError(f"--increment: expected a split stream, got {self.scenario}")
        if (self.images is None) == (self.scenario == IMAGES) and self.scenario != ALL:
            raise ValueError(
                f"--images: expected a folder for {IMAGES}, and none for other streams, got "
                f"{self.images} for {self.scenario}"
            )

    @property
    def scenarios(self) -> list[str]:
        """Which to run."""
        names = [self.scenario] if self.scenario != ALL else list(SCENARIO_DEFAULTS)
        return [name for name in names if name != IMAGES or self.images is not None]

    def increments(self, scenario: str) -> Sequence[str]:
        """What the network is to tell in a scenario; streams that are not split know only one."""
        if not scenario.startswith("split"):
            return (Configuration.increment,)
        return self.increment or INCREMENTS


def run(options: Options) -> int:
    """Run all experiments, print their tables, and say what failed."""
    from benchmarks.report.tables import terminal_notes, terminal_table
    from benchmarks.suite.sweep import Pool

    make_folder(options.output)
    found: list[Experiment] = []
    pool = Pool(options.output, options.data_root, options.jobs, options.threads)
    for name in options.scenarios:
        for increment in options.increments(name):
            try:
                found += _run_one(options, name, increment, pool)
            except ValueError as error:
                raise CommandError(f"{name}: {error}") from error
    console = make_console()
    console.print(*map(terminal_table, found), terminal_notes())
    print(f"Records of all runs are in {options.output}.")
    comparisons = orderings(found) if options.quick else {}
    for line in comparisons:
        print(line, flush=True)
    for trace in dict.fromkeys(pool.failures.values()):  # many runs fail for the same reason
        jobs = [job for job, other in pool.failures.items() if other == trace]
        print(f"\nFailed: {'; '.join(jobs)}\n{trace}", file=sys.stderr)
    return 0 if all(comparisons.values()) and not pool.failures else 1


def _run_one(options: Options, scenario: str, increment: str, pool: "Pool") -> "list[Experiment]":
    """Search and test all methods on one scenario; without a result if all runs fail."""
    from benchmarks.scenarios import make_scenario
    from benchmarks.suite.outcome import experiments
    from benchmarks.suite.sweep import Search, Sweep

    images = options.images if scenario == IMAGES else None
    fitting: dict[str, Any] = {"quick": options.quick, "increment": increment, "images": images}
    configuration, data = load(options, scenario, options.data_root, **fitting)
    values = options.search_values
    if values is None:
        values = QUICK_SEARCH_VALUES if options.quick else Search.values
    name = make_scenario(configuration, data, seed=0).name
    sweep = Sweep(
        configuration,
        options.methods,
        options.seeds or ((0,) if options.quick else (0, 1, 2)),
        Search(values, not options.quick, options.search_seeds),
        name,
        data.source,
    )
    return experiments((name, record) for record in sweep.run(pool.execute))


def orderings(found: "Sequence[Experiment]") -> dict[str, bool]:
    """Check what must hold at any size: ours forget less than EWC, and EWC less than no method.

    Absolute accuracies depend on the size of the data and the number of steps; orders do not.
    """
    from benchmarks.suite.outcome import mean_accuracy

    lines = {}
    for experiment in found:
        if experiment.scenario.endswith(UNORDERED_SUFFIX):
            continue
        accuracy = {label: mean_accuracy(group) for label, group in experiment.tested.items()}
        for better, worse in pairwise(name for name in ORDER if name in accuracy):
            holds = accuracy[better] > accuracy[worse]
            values = f"{better} {accuracy[better]:.2%} > {worse} {accuracy[worse]:.2%}"
            lines[f"{experiment.scenario}: {values}{'' if holds else ': NOT SO'}"] = holds
    return lines
