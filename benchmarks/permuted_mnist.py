"""Permuted MNIST: the same digits, their pixels in a new order in each task.

Run ``python -m benchmarks.permuted_mnist --help`` for the options.
"""

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.command import complain, make_console, obstacle, prepare
from benchmarks.configuration import Configuration, parse_configuration

if TYPE_CHECKING:
    from benchmarks.data import ImageData
    from benchmarks.records import Record

NAME = "permuted_mnist"
DESCRIPTION = """\
Train a network on one permuted-MNIST task after another with several methods, and compare what
is left of the earlier tasks at the end. Each task shows all images with their pixels in a new
order, drawn anew for every task, the first included.

Writes permuted_mnist.json (after every finished run) and permuted_mnist.png, and prints a table.
Where MNIST is neither found nor to be downloaded, scikit-learn's digits take its place.
Lists are separated by spaces or commas.
"""
REQUIREMENTS = {
    "avalanche": "avalanche-lib",
    "matplotlib": "matplotlib",
    "rich": "rich",
    "sklearn": "scikit-learn",
    "torchvision": "torchvision",
    "tqdm": "tqdm",
}
EXIT_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark.

    Args:
        arguments: Words of the command line; None for those of the process.

    Returns:
        The exit code: 0, 1 where something needed is missing, or 130 after an interruption.
    """
    configuration = parse_configuration(
        arguments, program=f"python -m benchmarks.{NAME}", description=DESCRIPTION
    )
    missing = [package for module, package in REQUIREMENTS.items() if not find_spec(module)]
    if problem := obstacle(missing, configuration.output):
        return complain(NAME, problem)
    records: list[Record] = []
    results = configuration.output / f"{NAME}.json"
    try:
        _run_all(configuration, results, records)
    except KeyboardInterrupt:
        kept = f"the records of finished runs are kept in {results}: {len(records)}"
        print(f"\nInterrupted; {kept if records else 'no run was finished, so nothing is kept'}.")
        return EXIT_INTERRUPTED
    return 0


def _run_all(configuration: Configuration, results: Path, records: "list[Record]") -> None:
    """Load the data, run everything, and present the results.

    Args:
        configuration: The options.
        results: The JSON file, rewritten after every run.
        records: Gets a record for every finished run.
    """
    configuration, data = prepare(configuration)
    _train_all(configuration, data, results, records)
    _present(configuration, data, results, records)


def _train_all(
    configuration: Configuration, data: "ImageData", results: Path, records: "list[Record]"
) -> None:
    """Run every method at every seed, all methods at one seed before the next."""
    from benchmarks.methods import variants
    from benchmarks.records import write_records
    from benchmarks.runner import run
    from benchmarks.scenarios import PermutedImages

    for seed in configuration.seeds:
        scenario = PermutedImages(data, configuration.tasks, seed)
        for variant in variants(configuration):
            record = run(variant, scenario, configuration, seed=seed, data_source=data.source)
            records.append(record)
            write_records(results, NAME, records)


def _present(
    configuration: Configuration, data: "ImageData", results: Path, records: "list[Record]"
) -> None:
    """Print the table, and draw the figure next to the results."""
    from benchmarks.plots import draw
    from benchmarks.report import results_table

    shown = "MNIST" if data.source == "mnist" else "digits (not MNIST)"
    seeds = len(configuration.seeds)
    title = f"Permuted {shown}: {configuration.tasks} tasks, {seeds} seed{'s' * (seeds > 1)}"
    make_console().print(results_table(records, title))
    picture = results.with_suffix(".png")
    draw(records, title).savefig(picture)
    print(f"Wrote {results} and {picture}.")


if __name__ == "__main__":
    sys.exit(main())
