"""Measure how long the estimation of a Fisher matrix takes, here and in other packages.

Run ``python -m benchmarks.speed --help`` for the options.
"""

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.command import complain, make_console, obstacle
from benchmarks.speed.names import combinations
from benchmarks.speed.options import NAME, Options, parse_options

if TYPE_CHECKING:
    from benchmarks.speed.results import Cell

REQUIREMENTS = {"matplotlib": "matplotlib", "rich": "rich", "tqdm": "tqdm"}
EXIT_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the measurements.

    Args:
        arguments: Words of the command line; None for those of the process.

    Returns:
        The exit code: 0, 1 where something needed is missing or earlier results cannot be
        combined with new ones, or 130 after an interruption.
    """
    options = parse_options(arguments)
    missing = [package for module, package in REQUIREMENTS.items() if not find_spec(module)]
    if problem := obstacle(missing, options.output):
        return complain(NAME, problem)
    try:
        _run(options)
    except ValueError as error:
        return complain(NAME, str(error))
    except KeyboardInterrupt:
        print("\nInterrupted; cases that were finished are kept.")
        return EXIT_INTERRUPTED
    return 0


def _run(options: Options) -> None:
    """Measure case by case; what is finished is written and printed at once."""
    from benchmarks.speed.measure import measure
    from benchmarks.speed.report import QUICK_WARNING, cell_table, floor_line
    from benchmarks.speed.results import merge, read_cells

    results = options.output / f"{NAME}.json"
    configuration = _configuration(options)
    cells = read_cells(results, configuration)
    console = make_console()
    print(machine_line(configuration), flush=True)
    if options.quick:
        print(QUICK_WARNING, flush=True)
    for combination in combinations(options.cases, options.fisher):
        cell = measure(combination, options, configuration["threads"])
        cells = merge(cells, [cell])
        _write(results, configuration, cells)
        console.print()
        console.print(cell_table(cell, configuration["threads"]))
        print(floor_line(cell), flush=True)
    print(f"\nWrote {results} and {results.with_suffix('.png')}.")


def _configuration(options: Options) -> dict[str, Any]:
    """What all results in a file have in common."""
    import torch

    from benchmarks.speed.machine import describe_machine

    threads = options.threads or torch.get_num_threads()
    return {"threads": threads, "quick": options.quick, **describe_machine()}


def machine_line(configuration: dict[str, Any]) -> str:
    """Say on what is measured."""
    threads = configuration["threads"]
    return (
        f"{configuration['processor']}, {configuration['cpu_count']} hardware threads; "
        f"PyTorch with {threads} thread{'s' * (threads > 1)}"
    )


def _write(results: Path, configuration: dict[str, Any], cells: "Sequence[Cell]") -> None:
    """Write the numbers and the figure of all cells."""
    import io

    from benchmarks.files import replace_file
    from benchmarks.speed.figure import draw
    from benchmarks.speed.results import write_cells

    write_cells(results, configuration, cells)
    image = io.BytesIO()
    draw(cells, machine_line(configuration), quick=configuration["quick"]).savefig(image)
    replace_file(results.with_suffix(".png"), image.getvalue())


if __name__ == "__main__":
    sys.exit(main())
