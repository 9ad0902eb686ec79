"""Tell apart why long streams of tasks lose accuracy.

Run ``python -m benchmarks.causes --help`` for the options.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from benchmarks.command import complain, make_console, obstacle
from benchmarks.configuration import check_output, default_data_root, flatten
from benchmarks.option_types import LARGEST_SEED, number, one_of, several, whole_number

if TYPE_CHECKING:
    from benchmarks.causes.training import Settings
    from benchmarks.data import ImageData

NAME = "causes"
FORMAT = "rotate_ewc.benchmarks.causes/1"
DESCRIPTION = """\
Learn a stream of permuted-MNIST tasks with each of two optimizers under each of three curvatures.
What a better curvature gains is lost by snapshots that are out of date (refreshed against stored)
or approximate (exact against refreshed); what the other optimizer gains is lost in training, not
in what the penalty knows. The oracles keep the old images, and are no methods to be used.

Accuracies are those on a sixth of the training images that is held out. Writes causes.json after
every run, and prints a table.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the experiment.

    Args:
        arguments: Words of the command line; None for those of the process.

    Returns:
        The exit code.
    """
    options = _parse(arguments)
    if problem := obstacle((), options.output):
        return complain(NAME, problem)
    import torch

    from benchmarks.data import load_images

    torch.set_num_threads(options.threads)
    data = load_images(options.data_root).for_validation()
    print(data.announcement, flush=True)
    _present(_run_all(options, data))
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line, with lists that are separated by spaces or commas."""
    parser = _parser()
    options = parser.parse_args(arguments)
    for name, value in vars(options).items():
        if isinstance(value, list):
            setattr(options, name, flatten(name, value, parser))
    check_output(options.output, parser)
    return options


def _parser() -> argparse.ArgumentParser:
    """The command line."""
    from benchmarks.causes.curvatures import CURVATURES
    from benchmarks.causes.training import OPTIMIZERS

    choices = {**OPTIMIZERS, **CURVATURES}
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{NAME}",
        description=DESCRIPTION,
        epilog="\n".join(f"{name}: {meaning}" for name, meaning in choices.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    count = whole_number(1)

    def add(option: str, default: Any, meaning: str, **how: Any) -> None:
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        parser.add_argument(
            f"--{option}", default=default, help=f"{meaning} (default: {shown})", **how
        )

    add(
        "optimizers",
        tuple(OPTIMIZERS),
        "any of the two",
        type=several(one_of(OPTIMIZERS)),
        nargs="+",
    )
    add(
        "curvatures",
        tuple(CURVATURES),
        "any of the three",
        type=several(one_of(CURVATURES)),
        nargs="+",
    )
    add("tasks", 20, "number of tasks", type=count)
    add("epochs", 2, "passes over the data of each task", type=count)
    add("batch-size", 250, "images per step", type=count)
    add("lr", 3e-3, "learning rate, which falls to zero in each task", type=number(zero=False))
    add("hidden", (100, 100), "widths of the hidden layers", type=several(count), nargs="+")
    add("ewc-lambda", 3.0, "strength of the penalty", type=number(zero=True))
    add("fisher-samples", 2_000, "images for each snapshot", type=count)
    add("exact-samples", 2_000, "old images per step under the exact curvature", type=count)
    seed = whole_number(0, LARGEST_SEED)
    add("seeds", (0,), "every combination is run once with each", type=several(seed), nargs="+")
    add("threads", 1, "CPU threads of PyTorch", type=count)
    add("data-root", default_data_root(), "where MNIST is, or is downloaded to", type=Path)
    add("output", Path("results"), "where the results go", type=Path)
    return parser


def _run_all(options: argparse.Namespace, data: "ImageData") -> list[dict[str, Any]]:
    """Run every combination, writing the records after each."""
    from benchmarks.causes.training import Settings
    from benchmarks.records import write_document
    from benchmarks.versions import versions

    settings = Settings(
        epochs=options.epochs,
        batch_size=options.batch_size,
        learning_rate=options.lr,
        hidden=options.hidden,
        strength=options.ewc_lambda,
        snapshot_examples=options.fisher_samples,
        exact_examples=options.exact_samples,
    )
    records: list[dict[str, Any]] = []
    for seed in options.seeds:
        for curvature in options.curvatures:
            for optimizer in options.optimizers:
                combination = {"optimizer": optimizer, "curvature": curvature, "seed": seed}
                accuracies = _run(data, settings, options.tasks, combination)
                records.append({**combination, "accuracies": accuracies})
                document = {
                    "format": FORMAT,
                    "data": data.source,
                    "settings": dataclasses.asdict(settings),
                    "versions": versions(),
                    "records": records,
                }
                write_document(options.output / f"{NAME}.json", document)
    return records


def _run(
    data: "ImageData", settings: "Settings", tasks: int, combination: dict[str, Any]
) -> list[float]:
    """Return the accuracies on all tasks after the last."""
    from tqdm import tqdm

    from benchmarks.causes.curvatures import OldTasks
    from benchmarks.causes.training import Run
    from benchmarks.scenarios import PermutedImages

    scenario = PermutedImages(data, tasks, combination["seed"])
    run = Run(OldTasks(scenario, data.train_inputs, data.train_labels), settings, **combination)
    steps = tasks * settings.epochs * -(-len(data.train_inputs) // settings.batch_size)
    title = "{optimizer}, {curvature}, seed {seed}".format(**combination)
    with tqdm(total=steps, desc=title, disable=not sys.stderr.isatty()) as progress:
        for task in range(tasks):
            run.learn(task, progress.update)
    accuracies = run.accuracies(tasks)
    print(f"{title}: {100 * fmean(accuracies):.2f} %", flush=True)
    return accuracies


def _present(records: Sequence[dict[str, Any]]) -> None:
    """Print the table: means over seeds, and their deviations."""
    from benchmarks.report import add_number_columns, empty_table, percent

    table = empty_table("Accuracy after the last task [%]")
    table.add_column("optimizer")
    table.add_column("curvature")
    add_number_columns(table, "all tasks", "first", "middle", "last")
    for key in dict.fromkeys((record["optimizer"], record["curvature"]) for record in records):
        group = [r["accuracies"] for r in records if (r["optimizer"], r["curvature"]) == key]
        last = len(group[0]) - 1
        columns = [[fmean(one) for one in group]]
        columns += [[one[place] for one in group] for place in (0, last // 2, last)]
        table.add_row(*key, *(percent(column) for column in columns))
    make_console().print(table)


if __name__ == "__main__":
    sys.exit(main())
