"""``study-constant-cost``: what a penalty costs after few tasks and after many."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Annotated

from benchmarks.command import make_folder, print_table, use_threads
from benchmarks.files import write_document
from benchmarks.option_types import Count
from benchmarks.speed.options import COUNTS, MeasuringOptions

if TYPE_CHECKING:
    from benchmarks.speed.steps import History
    from rotate_ewc import EKFACPenalty

FORMAT = "rotate_ewc.benchmarks.constant_cost/2"
REFERENCE = 2
FEATURES, CLASSES, BATCH = 784, 10, 250
MODES = ("merged", "separate")
PENALTY, TRAINING_STEP, ROTATED_STEP = "penalty", "training step", "RotatedAdam step"
QUANTITIES = (PENALTY, TRAINING_STEP, ROTATED_STEP)

# A quantity, a mode (empty without a penalty), and a number of tasks.
Contender = tuple[str, str, int]


@dataclass(frozen=True, kw_only=True)
class Options(MeasuringOptions):
    """Time what a penalty costs after few tasks and after many, merged and separate.

    Its value and gradient, the whole training step (a batch of 250, Adam) with it in the loss, the
    step of RotatedAdam where tasks are merged, and the size of what is kept; and the training step
    without a penalty. The network is 784-100-100-10, or has other hidden layers.

    All contenders take turns within one process: in every round each is called some times, of which
    the median counts. Times are medians over the rounds. Ratios are to the cost after two tasks in
    the same round, and medians over the rounds too. The images are noise: cost depends on shapes
    alone.

    Writes constant_cost.json, and prints a table. Takes some minutes, of a machine with nothing
    else to do.

    Attributes:
        hidden: Widths of the hidden layers.
        tasks: Numbers of tasks; 2 is always among them.
        rounds: Number of rounds, at least 5.
        repetitions: Calls of each contender in a round.
    """

    hidden: Annotated[tuple[int, ...], COUNTS] = (100, 100)
    tasks: Annotated[tuple[int, ...], COUNTS] = (1, 2, 10, 50)
    rounds: Count = 7
    repetitions: Count = 50

    def __post_init__(self) -> None:
        """Check the number of rounds, and put the numbers of tasks in order."""
        self.settle_rounds()
        object.__setattr__(self, "tasks", tuple(sorted({REFERENCE, *self.tasks})))


@dataclass(frozen=True)
class Cost:
    """The cost of training with one penalty, or with none."""

    mode: str  # one of :data:`MODES`; empty without a penalty
    tasks: int  # number of consolidated tasks
    rounds: dict[str, list[float]]  # seconds in each round, by quantity
    state_bytes: int = 0  # size of the tensors that the penalty keeps


def run(options: Options) -> int:
    """Measure, then write and print everything."""
    import torch

    from benchmarks.versions import versions

    make_folder(options.output)
    use_threads(options.threads)
    threads = torch.get_num_threads()
    costs = measure(options)
    fields = {**dataclasses.asdict(options), "threads": threads}
    del fields["output"]
    path = options.output / "constant_cost.json"
    document = {
        "format": FORMAT,
        "configuration": fields,
        "reference_tasks": REFERENCE,
        "records": [dataclasses.asdict(cost) for cost in costs],
        "versions": versions(),
    }
    write_document(path, document)
    widths = "-".join(map(str, (FEATURES, *options.hidden, CLASSES)))
    title = (
        f"{widths}: medians of {options.rounds} rounds of {options.repetitions} calls; ratios to "
        f"{REFERENCE} tasks; {threads} thread{'s' * (threads > 1)}"
    )
    measured = ("penalty\n[ms]", "training\nstep [ms]", "RotatedAdam\nstep [ms]", "state\n[MiB]")
    numbers = [heading for name in measured for heading in (name, "\nratio")]
    print_table(title, ["\nmode"], ["\ntasks", *numbers], rows_of(costs))
    print(f"Wrote {path}.")
    return 0


def measure(options: Options) -> list[Cost]:
    """Consolidate, and time everything that is there then."""
    import torch

    from benchmarks.speed.cases import Case, build_case
    from benchmarks.speed.networks import perceptron
    from benchmarks.speed.rounds import time_in_rounds
    from benchmarks.speed.steps import live

    widths = (FEATURES, *options.hidden, CLASSES)
    case = Case(lambda: perceptron(*widths), (FEATURES,), BATCH, BATCH)
    torch.manual_seed(0)
    history = live(build_case(case), options.tasks, options.tasks)
    seconds = time_in_rounds(
        contenders(history), rounds=options.rounds, repetitions=options.repetitions
    )
    sizes = {("", 0): 0, **{place: penalty.nbytes for place, penalty in penalties(history).items()}}
    costs = []
    for (mode, tasks), size in sizes.items():
        times = {q: seconds[q, mode, tasks] for q in QUANTITIES if (q, mode, tasks) in seconds}
        costs.append(Cost(mode, tasks, times, size))
    return costs


def penalties(history: "History") -> "dict[tuple[str, int], EKFACPenalty]":
    """All penalties by mode and number of tasks."""
    by_mode = {"merged": history.merged, "separate": history.separate}
    return {(mode, tasks): p for mode, found in by_mode.items() for tasks, p in found.items()}


def contenders(history: "History") -> dict[Contender, Callable[[], object]]:
    """All that is timed; those of the same quantity and mode are neighbours."""
    from benchmarks.speed import steps

    workload, found = history.workload, penalties(history)
    return {
        (TRAINING_STEP, "", 0): steps.plain_step(workload),
        **{(PENALTY, *place): steps.value_and_gradient(workload, p) for place, p in found.items()},
        **{(TRAINING_STEP, *place): steps.plain_step(workload, p) for place, p in found.items()},
        **{
            (ROTATED_STEP, "merged", tasks): steps.rotated_update(workload, p)
            for tasks, p in history.merged.items()
        },
    }


def rows_of(costs: Sequence[Cost]) -> list[list[str]]:
    """A row for plain training and for each penalty; every number has its ratio next to it."""
    from benchmarks.report.tables import ABSENT, MEBIBYTE
    from benchmarks.speed.report import number
    from benchmarks.speed.rounds import median_ratio

    rows = []
    references = {cost.mode: cost for cost in costs if cost.tasks == REFERENCE}
    for cost in costs:
        reference = references.get(cost.mode)
        cells = [cost.mode or "no penalty", str(cost.tasks) if reference else ABSENT]
        for quantity in QUANTITIES:
            times = cost.rounds.get(quantity)
            milliseconds = 1_000 * median(times) if times else None
            compared = times and reference and median_ratio(times, reference.rounds[quantity])
            cells += [number(milliseconds, ".2f"), number(compared or None, ".2f")]
        size = cost.state_bytes / MEBIBYTE if reference else None
        ratio = cost.state_bytes / reference.state_bytes if reference else None
        rows.append([*cells, number(size, ".2f"), number(ratio, ".2f")])
    return rows
