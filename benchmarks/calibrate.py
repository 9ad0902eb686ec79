"""Calibrate the strength λ on two tasks of permuted MNIST.

Run ``python -m benchmarks.calibrate --help`` for the options.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from benchmarks.command import complain, make_console, obstacle, prepare
from benchmarks.configuration import Configuration, add_arguments, configuration_from

if TYPE_CHECKING:
    from rich.table import Table

    from benchmarks.calibration import Calibration
    from benchmarks.data import ImageData

NAME = "calibrate"
FORMAT = "rotate_ewc.benchmarks.calibrate/1"
DESCRIPTION = """\
Choose the strength λ for a stream of permuted-MNIST tasks from its first two tasks alone. The
second is trained with --ewc-lambda; λ is how many times more harm it has done to the first than
the penalty takes it to have done. Harm is the growth of the mean loss on the first task's first
10,000 training images (or all, where they are fewer); no test image and no later task has a part
in it. The accuracies that are printed beside it are those on the test images of the two tasks, or
with --validate on training images that are held out.

Writes calibrate.json (after every finished run), and prints a table.
Where MNIST is neither found nor to be downloaded, scikit-learn's digits take its place.
Lists are separated by spaces or commas.
"""
METHODS = ("rotated-ewc", "rotated-ewc-proximal", "rotated-adam")
LEFT_OUT = ("--tasks", "--baseline-ewc-lambda")
REQUIREMENTS = {
    "avalanche": "avalanche-lib",
    "rich": "rich",
    "sklearn": "scikit-learn",
    "torchvision": "torchvision",
    "tqdm": "tqdm",
}
EXIT_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the calibration.

    Args:
        arguments: Words of the command line; None for those of the process.

    Returns:
        The exit code: 0, 1 where something needed is missing, or 130 after an interruption.
    """
    configuration = _parse(arguments)
    missing = [package for module, package in REQUIREMENTS.items() if not find_spec(module)]
    if problem := obstacle(missing, configuration.output):
        return complain(NAME, problem)
    results = configuration.output / f"{NAME}.json"
    calibrations: list[Calibration] = []
    try:
        _run_all(configuration, results, calibrations)
    except KeyboardInterrupt:
        kept = f"the records of finished runs are kept in {results}: {len(calibrations)}"
        nothing = "no run was finished, so nothing is kept"
        print(f"\nInterrupted; {kept if calibrations else nothing}.")
        return EXIT_INTERRUPTED
    return 0


def _parse(arguments: Sequence[str] | None) -> Configuration:
    """Turn a command line into a configuration of two tasks."""
    defaults = Configuration(tasks=2, ewc_lambda=1.0, methods=METHODS[:1])
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{NAME}",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser, defaults, methods=METHODS, leave_out=LEFT_OUT)
    return configuration_from(parser.parse_args(arguments), parser, defaults)


def _run_all(
    configuration: Configuration, results: Path, calibrations: "list[Calibration]"
) -> None:
    """Load the data, calibrate every method at every seed, and present the results.

    Args:
        configuration: The options.
        results: The JSON file, rewritten after every run.
        calibrations: Gets one for every finished run.
    """
    configuration, data = prepare(configuration)
    _calibrate_all(configuration, data, results, calibrations)
    make_console().print(_table(calibrations, _title(configuration, data)))
    print(f"Wrote {results}.")


def _calibrate_all(
    configuration: Configuration,
    data: "ImageData",
    results: Path,
    calibrations: "list[Calibration]",
) -> None:
    """Calibrate every method at every seed, all methods at one seed before the next."""
    from benchmarks.calibration import calibrate
    from benchmarks.methods import variants
    from benchmarks.scenarios import PermutedImages

    for seed in configuration.seeds:
        scenario = PermutedImages(data, configuration.tasks, seed)
        for variant in variants(configuration):
            calibrations.append(
                calibrate(variant, scenario, configuration, seed=seed, data_source=data.source)
            )
            _write(results, calibrations)


def _write(results: Path, calibrations: "Sequence[Calibration]") -> None:
    """Write all calibrations, and their medians over the seeds so far."""
    from benchmarks.records import write_document

    write_document(
        results,
        {
            "format": FORMAT,
            "median_strengths": {
                method: median(calibration.strength for calibration in group)
                for method, group in _by_method(calibrations).items()
            },
            "records": [dataclasses.asdict(calibration) for calibration in calibrations],
        },
    )


def _by_method(calibrations: "Sequence[Calibration]") -> "dict[str, list[Calibration]]":
    """Collect the seeds of each method."""
    groups: dict[str, list[Calibration]] = {}
    for calibration in calibrations:
        groups.setdefault(calibration.method, []).append(calibration)
    return groups


def _title(configuration: Configuration, data: "ImageData") -> str:
    """Say what was done to whom."""
    shown = "MNIST" if data.source == "mnist" else "digits (not MNIST)"
    return f"Permuted {shown}: two tasks, the second with λ = {configuration.ewc_lambda:g}"


def _table(calibrations: "Sequence[Calibration]", title: str) -> "Table":
    """A row for every seed of every method, and one for the medians where there are several.

    Harm over predicted harm is a quotient of two small numbers, and its mean no steady thing.
    """
    from benchmarks.report import add_number_columns, empty_table

    table = empty_table(title)
    table.add_column("\nmethod")
    headings = ("\nseed", "calibrated\nλ", "first task\n[%]", "second task\n[%]")
    add_number_columns(table, *headings)
    for method, group in _by_method(calibrations).items():
        several = [("median", group)] if len(group) > 1 else []
        for seed, some in [*((str(one.seed), [one]) for one in group), *several]:
            table.add_row(
                method,
                seed,
                f"{median(one.strength for one in some):.2f}",
                *(f"{100 * median(one.accuracies[i] for one in some):.2f}" for i in range(2)),
            )
    return table


if __name__ == "__main__":
    sys.exit(main())
