"""Measure what the penalty costs in a training step, here and in other packages.

Run ``python -m benchmarks.speed.penalty --help`` for the options.
"""

import dataclasses
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.command import complain, make_console, obstacle
from benchmarks.speed.penalty.options import NAME, Options, parse_options

if TYPE_CHECKING:
    from benchmarks.speed.penalty.results import Duration, Record

REQUIREMENTS = {"matplotlib": "matplotlib", "rich": "rich", "tqdm": "tqdm"}
EXIT_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the measurements.

    Args:
        arguments: Words of the command line; None for those of the process.

    Returns:
        The exit code: 0, 1 where something needed is missing, or 130 after an interruption.
    """
    options = parse_options(arguments)
    missing = [package for module, package in REQUIREMENTS.items() if not find_spec(module)]
    if problem := obstacle(missing, options.output):
        return complain(NAME, problem)
    try:
        _run(options, options.output / f"{NAME}.json")
    except KeyboardInterrupt:
        print("\nInterrupted; cases that were finished are kept.")
        return EXIT_INTERRUPTED
    return 0


def _run(options: Options, results: Path) -> None:
    """Measure case by case; what is finished is written and printed at once."""
    import torch

    from benchmarks.speed.__main__ import machine_line
    from benchmarks.speed.penalty.measure import measure
    from benchmarks.speed.penalty.outside import time_imports, time_loading
    from benchmarks.speed.penalty.report import comparisons_table, durations_table, times_table
    from benchmarks.speed.report import QUICK_WARNING

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    configuration = _configuration(options)
    print(machine_line(configuration), flush=True)
    if options.quick:
        print(QUICK_WARNING, flush=True)
    console = make_console()
    records: list[Record] = []
    for case in options.cases:
        records.append(measure(case, options))
        _write(results, configuration, records, [])
        console.print()
        console.print(times_table(records[-1], configuration["threads"]))
        console.print()
        console.print(comparisons_table(records[-1]))
    durations = [
        time_loading(options.rounds, quick=options.quick),
        time_imports(quick=options.quick),
    ]
    _write(results, configuration, records, durations)
    console.print()
    console.print(durations_table(durations))
    print(f"\nWrote {results} and {results.with_suffix('.png')}.")


def _configuration(options: Options) -> dict[str, Any]:
    """The options, but for the folder, and what the machine is."""
    import torch

    from benchmarks.speed.machine import describe_machine

    fields = dataclasses.asdict(options)
    del fields["output"]
    return {**fields, "threads": torch.get_num_threads(), **describe_machine()}


def _write(
    results: Path,
    configuration: dict[str, Any],
    records: "Sequence[Record]",
    durations: "Sequence[Duration]",
) -> None:
    """Write the numbers and the figure of all that was measured."""
    import io

    from benchmarks.files import replace_file
    from benchmarks.speed.__main__ import machine_line
    from benchmarks.speed.penalty.figure import draw
    from benchmarks.speed.penalty.results import write

    write(results, configuration, records, durations)
    image = io.BytesIO()
    draw(records, machine_line(configuration), quick=configuration["quick"]).savefig(image)
    replace_file(results.with_suffix(".png"), image.getvalue())


if __name__ == "__main__":
    sys.exit(main())
