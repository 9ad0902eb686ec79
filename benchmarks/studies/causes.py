"""``study-causes``: tell apart why long streams of tasks lose accuracy."""

import dataclasses
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

from benchmarks.command import keep, make_folder, print_table, use_threads
from benchmarks.configuration import DataRoot, default_data_root
from benchmarks.option_types import (
    Count,
    Folder,
    Positive,
    PositiveOrZero,
    Seeds,
    one_of,
    renamed,
    several,
    whole_number,
)

if TYPE_CHECKING:
    from benchmarks.data import ImageData

NAME = "causes"
FORMAT = "rotate_ewc.benchmarks.causes/2"
UPDATES = ("loss", "rotated")
CURVATURES = ("stored", "refreshed", "exact")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Learn a stream of permuted-MNIST tasks in two ways under three curvatures.

    What a better curvature gains is lost by snapshots that are out of date (refreshed against
    stored) or approximate (exact against refreshed); what the other way gains is lost in training,
    not in what the penalty knows. The oracles keep the old images, and are no methods to
    be used.

    Accuracies are those on a sixth of the training images that is held out. Writes causes.json
    after every run, and prints a table.

    Attributes:
        updates: loss: Adam, with the penalty in the loss. rotated: Adam with the penalty attached,
            which steps in the eigenbasis of the snapshots (where the curvature is exact, its
            penalty is in the loss, and the snapshots lend the basis only).
        curvatures: stored: snapshots taken when their tasks ended, and merged. refreshed: snapshots
            of all tasks taken again, at the latest parameters, after every task. exact: the
            Gauss-Newton matrix of the whole network at the latest parameters, without blocks or
            Kronecker products, from a new sample of old images in every step.
        tasks: Number of tasks.
        epochs: Passes over the data of each task.
        batch_size: Images per step.
        learning_rate: Step size, which falls to zero in each task.
        hidden: Widths of the hidden layers.
        ewc_lambda: Strength of the penalty.
        fisher_samples: Images for each snapshot.
        exact_samples: Old images per step under the exact curvature.
        seeds: Every combination is run once with each.
        threads: CPU threads of PyTorch.
        data_root: Where MNIST is, or is downloaded to.
        output: Where the results go.
    """

    updates: Annotated[tuple[str, ...], several(one_of(UPDATES))] = UPDATES
    curvatures: Annotated[tuple[str, ...], several(one_of(CURVATURES))] = CURVATURES
    tasks: Count = 20
    epochs: Count = 2
    batch_size: Count = 250
    learning_rate: Annotated[Positive, renamed("lr")] = 3e-3
    hidden: Annotated[tuple[int, ...], several(whole_number(1), repeated=True)] = (100, 100)
    ewc_lambda: PositiveOrZero = 3.0
    fisher_samples: Count = 2_000
    exact_samples: Count = 2_000
    seeds: Seeds = (0,)
    threads: Count = 1
    data_root: DataRoot = field(default_factory=default_data_root)
    output: Folder = Path("results")


@dataclass(frozen=True)
class Outcome:
    """The results of one combination at one seed."""

    update: str  # one of :data:`UPDATES`
    curvature: str  # one of :data:`CURVATURES`
    seed: int
    accuracies: list[float]  # on all tasks, after the last


def run(options: Options) -> int:
    """Run every combination, and present the results."""
    from benchmarks.data import load_images
    from benchmarks.versions import versions

    make_folder(options.output)
    use_threads(options.threads)
    data = load_images(options.data_root).for_validation()
    print(data.announcement, flush=True)
    left_out = ("updates", "curvatures", "seeds", "threads", "data_root", "output")
    settings = dataclasses.asdict(options)
    document = {
        "format": FORMAT,
        "data": data.source,
        "settings": {name: value for name, value in settings.items() if name not in left_out},
        "versions": versions(),
    }
    outcomes = keep(_outcomes(options, data), options.output / f"{NAME}.json", document)
    headings = ("all tasks", "first", "middle", "last")
    title = "Accuracy after the last task [%]"
    print_table(title, ["update", "curvature"], headings, rows_of(outcomes))
    return 0


def rows_of(outcomes: Iterable[Outcome]) -> Iterator[tuple[str, ...]]:
    """A row for each combination: means over seeds, and their deviations."""
    from benchmarks.report.tables import percent

    groups: dict[tuple[str, str], list[list[float]]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome.update, outcome.curvature), []).append(outcome.accuracies)
    for names, group in groups.items():
        last = len(group[0]) - 1
        single = ([one[place] for one in group] for place in (0, last // 2, last))
        yield (*names, percent(map(fmean, group)), *map(percent, single))


def _outcomes(options: Options, data: "ImageData") -> Iterator[Outcome]:
    """Run all combinations at one seed before the next."""
    import torch
    from tqdm import tqdm

    from benchmarks.experiment import accuracies
    from benchmarks.scenarios import PermutedImages
    from benchmarks.studies.oracles import OldTasks, Run

    steps = options.tasks * options.epochs * -(-len(data.train_inputs) // options.batch_size)
    for seed in options.seeds:
        scenario = PermutedImages(data, options.tasks, seed)
        old = OldTasks(scenario, data.train_inputs, data.train_labels)
        for curvature in options.curvatures:
            for update in options.updates:
                title = f"{update}, {curvature}, seed {seed}"
                one = Run(old, options, update=update, curvature=curvature, seed=seed)
                bar: Any
                with tqdm(total=steps, desc=title, disable=not sys.stderr.isatty()) as bar:
                    for task in range(options.tasks):
                        one.learn(task, bar.update)
                reached = accuracies(one.model, scenario, torch.device("cpu"))
                print(f"{title}: {100 * fmean(reached):.2f} %", flush=True)
                yield Outcome(update, curvature, seed, reached)
