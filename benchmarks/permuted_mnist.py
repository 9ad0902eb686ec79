"""Permuted MNIST: the same digits, their pixels in a new order in each task.

Run ``python -m benchmarks.permuted_mnist --help`` for the options.
"""

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

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
LOG_WIDTH = 110


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
    if missing:
        return _complain(f"something is missing; it comes with: pip install {' '.join(missing)}")
    try:
        configuration.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return _complain(f"--output: cannot make the folder: {error}")
    records: list[Record] = []
    results = configuration.output / f"{NAME}.json"
    try:
        _run_all(configuration, results, records)
    except KeyboardInterrupt:
        kept = f"the records of finished runs are kept in {results}: {len(records)}"
        print(f"\nInterrupted; {kept if records else 'no run was finished, so nothing is kept'}.")
        return EXIT_INTERRUPTED
    return 0


def _complain(message: str) -> int:
    """Say what prevents the benchmark from running, and return the exit code for it."""
    print(f"benchmarks.{NAME}: error: {message}", file=sys.stderr)
    return 1


def _run_all(configuration: Configuration, results: Path, records: "list[Record]") -> None:
    """Load the data, run everything, and present the results.

    Args:
        configuration: The options.
        results: The JSON file, rewritten after every run.
        records: Gets a record for every finished run.
    """
    import torch

    from benchmarks.data import load_images

    if configuration.threads is not None:
        torch.set_num_threads(configuration.threads)
    data = load_images(configuration.data_root)
    print(data.announcement, flush=True)
    if data.source == "digits":
        configuration = configuration.for_digits()
        print(
            f"So few images are learned with --epochs {configuration.epochs} "
            f"--batch-size {configuration.batch_size}.",
            flush=True,
        )
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
    from rich.console import Console

    from benchmarks.plots import draw
    from benchmarks.report import results_table

    shown = "MNIST" if data.source == "mnist" else "digits (not MNIST)"
    seeds = len(configuration.seeds)
    title = f"Permuted {shown}: {configuration.tasks} tasks, {seeds} seed{'s' * (seeds > 1)}"
    # A log has no width, and the guess for it would break the lines.
    console = Console(width=None if sys.stdout.isatty() else LOG_WIDTH)
    console.print(results_table(records, title))
    picture = results.with_suffix(".png")
    draw(records, title).savefig(picture)
    print(f"Wrote {results} and {picture}.")


if __name__ == "__main__":
    sys.exit(main())
