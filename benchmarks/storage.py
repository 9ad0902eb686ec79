"""Measure what snapshots in files cost: bytes, time, and accuracy where they have fewer bits.

Run ``python -m benchmarks.storage --help`` for the options.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, median, stdev
from typing import TYPE_CHECKING

from benchmarks.calibrate import EXIT_INTERRUPTED, METHODS, REQUIREMENTS
from benchmarks.command import complain, make_console, obstacle, prepare
from benchmarks.configuration import Configuration, add_arguments, configuration_from

if TYPE_CHECKING:
    from rich.table import Table

    from benchmarks.data import ImageData
    from benchmarks.stored import Stored

NAME = "storage"
FORMAT = "rotate_ewc.benchmarks.storage/1"
DESCRIPTION = """\
Learn a stream of permuted-MNIST tasks, and after each put what the penalty has learned into a file
and take it from there: once with all bits, and once with bases and eigenvalues in bfloat16. Prints
accuracies, sizes, times, and what the storing changed of the penalty's value at the end of a task.

Writes storage.json (after every finished run), and prints a table.
Where MNIST is neither found nor to be downloaded, scikit-learn's digits take its place.
Lists are separated by spaces or commas.
"""
LEFT_OUT = ("--baseline-ewc-lambda",)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the measurements.

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
    try:
        _run_all(configuration, results)
    except KeyboardInterrupt:
        print(f"\nInterrupted; the records of finished runs, if any, are in {results}.")
        return EXIT_INTERRUPTED
    return 0


def _parse(arguments: Sequence[str] | None) -> Configuration:
    defaults = Configuration(methods=METHODS[:1])
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{NAME}",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser, defaults, methods=METHODS, leave_out=LEFT_OUT)
    configuration = configuration_from(parser.parse_args(arguments), parser, defaults)
    if configuration.tasks < 2:
        parser.error("argument --tasks: expected at least 2: what is stored serves later tasks")
    return configuration


def _run_all(configuration: Configuration, results: Path) -> None:
    """Load the data, run every method at every seed and precision, and present the results."""
    from benchmarks.methods import variants
    from benchmarks.records import write_document
    from benchmarks.scenarios import PermutedImages
    from benchmarks.stored import PRECISIONS, run_stored

    configuration, data = prepare(configuration)
    records: list[Stored] = []
    for seed in configuration.seeds:
        scenario = PermutedImages(data, configuration.tasks, seed)
        for variant in variants(configuration):
            for precision in PRECISIONS:
                found = run_stored(
                    variant,
                    scenario,
                    configuration,
                    precision=precision,
                    seed=seed,
                    data_source=data.source,
                )
                records.append(found)
                listed = [dataclasses.asdict(record) for record in records]
                write_document(results, {"format": FORMAT, "records": listed})
    make_console().print(_table(records, _title(configuration, data)))
    print(f"Wrote {results}.")


def _title(configuration: Configuration, data: "ImageData") -> str:
    shown = "MNIST" if data.source == "mnist" else "digits (not MNIST)"
    return f"Permuted {shown}: {configuration.tasks} tasks, the penalty stored after each"


def _table(records: "Sequence[Stored]", title: str) -> "Table":
    """A row for every method and precision."""
    from benchmarks.report import add_number_columns, empty_table

    table = empty_table(title)
    table.add_column("\nmethod")
    table.add_column("\nstored in")
    headings = (
        *("accuracy\n[%]", "file\n[KiB]"),
        *("largest error\nof the penalty", "save\n[ms]", "load\n[ms]"),
    )
    add_number_columns(table, *headings)
    for method, precision in dict.fromkeys((r.method, r.precision) for r in records):
        group = [r for r in records if (r.method, r.precision) == (method, precision)]
        accuracies = [100 * record.average_accuracy for record in group]
        spread = f" ± {stdev(accuracies):.2f}" if len(group) > 1 else ""
        table.add_row(
            method,
            precision,
            f"{mean(accuracies):.2f}{spread}",
            f"{group[-1].file_bytes / 1024:.0f}",
            f"{max(e for record in group for e in record.penalty_errors):.1e}",
            f"{1_000 * median(s for record in group for s in record.save_seconds):.1f}",
            f"{1_000 * median(s for record in group for s in record.load_seconds):.1f}",
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
